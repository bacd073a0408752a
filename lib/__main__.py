"""The workbook's command line: `python -m lib --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from lib import runs
from lib.files import data_root  # the modules that load torch are imported by the commands that need them

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def main(arguments: list[str] | None = None) -> int:
    """Exit code of one command."""
    parser = argparse.ArgumentParser(prog="python -m lib", description="What makes a logit bias effective?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: Callable[[argparse.Namespace], int], about: str) -> Callable:
        added = commands.add_parser(name, help=about)
        added.set_defaults(command=call)
        return added.add_argument

    add = command("run", _run, "execute a notebook headless and keep its record")
    add("notebook", help="its name, 05_tune_amu")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    add("--folder", type=Path, help="where the run goes (default: runs/NOTEBOOK)")
    add("--lenient", action="store_true", help="leave out parameters that this notebook does not have")
    add = command("summary", _summary, "print the table of the last run of notebook 05")
    add("folder", type=Path, nargs="?", default=Path("runs"))
    add = command("figures", _figures, "bring the figures of a whole run into the gallery, figures/")
    add("folder", type=Path, nargs="?", default=Path("runs"))
    add = command("encoders", _encoders, "list the encoders by name")
    add("parts", nargs="*", help="show names that contain all of these, such as: timm dino")
    add = command("datasets", _datasets, "say which data sets are here, and how to get the others")
    add("names", nargs="*", help="describe these, folder:PATH included, and look for leaks")
    add = command("extract", _extract, "fill the cache of features; resumes where it was stopped")
    add("dataset", help="dtd, folder:PATH, imagenet@16/1, …")
    add("encoders", nargs="+", help="several share one pass over the images")
    add("--splits", nargs="+", help="(default: all that the data set has)")
    add("--views", type=int, default=1, help="random crops and flips of each image; 1: the plain image")
    add("--device", default="auto", help="auto, cuda, mps, cpu")
    add("--precision", default="fp32", help="fp32 or bf16")
    add("--batch-size", type=int, default=64, help="network inputs at once (default: 64)")
    add("--num-workers", type=int, default=0, help="decoding processes (default: 0, decode here)")
    add("--quarantine", action="store_true", help="leave out images that cannot be decoded")

    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    notebook = runs.notebook_path(options.notebook).stem
    types = {name: type_ for name, (type_, _) in runs.declared(notebook).items()}
    given = {name: _typed(text, types.get(name, str)) for name, text in options.p}
    if options.lenient:
        given = {name: value for name, value in given.items() if name in types}
    folder = options.folder or runs.ROOT / "runs" / notebook
    record = runs.execute(notebook, given, folder)
    print(f"{notebook}: {record['seconds']} s -> {folder}")
    return 0


def _typed(text: str, type_: type) -> object:
    """A command-line text as the type its parameter has; as it stands where it does not fit, to be refused."""
    if type_ is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return type_(text)
    except ValueError:
        return text


def _figures(options: argparse.Namespace) -> int:
    print(f"figures/: {', '.join(runs.fill_gallery(options.folder))}")
    return 0


def _summary(options: argparse.Namespace) -> int:
    path = options.folder / "05_tune_amu" / "metrics.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: notebook 05 has not finished")
    import pandas as pd

    record = runs.read_records(path.parent)[0]
    given, rows = record["parameters"], record["metrics"]["accuracy"]
    cells = {title: {int(k): _interval(**cell) for k, cell in row.items()} for title, row in rows.items()}
    print(f"\nTest accuracy in % on {given['dataset']}, mean and 95 % interval over {given['seeds']} seeds, by shots;")
    print(f"hyper-parameters chosen by protocol '{given['protocol']}'\n")
    print(pd.DataFrame(cells).T.sort_index(axis=1).to_string())
    print(f"\nexecuted notebooks and figures: {options.folder}/NN_name/\n")
    return 0


def _interval(mean: float, half: float | None, **_: object) -> str:
    return f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"  # one draw has no interval


def _encoders(options: argparse.Namespace) -> int:
    from lib.features import encoders

    names = [name for name in encoders.listed() if all(part.lower() in name.lower() for part in options.parts)]
    print("\n".join(names))
    print(f"{len(names)} encoders; names are {encoders.GRAMMAR}", file=sys.stderr)
    return 0


def _datasets(options: argparse.Namespace) -> int:
    from lib.features import datasets

    for name in options.names:
        data = datasets.load(name)
        splits = {split: data.images(split) for split in data.splits}
        print(f"{name}: {len(data.classnames)} classes, {', '.join(f'{s} {len(x)}' for s, x in splits.items())}")
        print(f"    classes: {', '.join(data.classnames[:5])}, …\n    prompts: {' | '.join(data.templates)}")
        print(f"    {data.source}")
        for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
            if {one, other} <= set(splits):
                pairs = datasets.shared(splits[one], splits[other])
                example = f", such as {pairs[0][0]} and {pairs[0][1]}" if pairs else ""
                print(f"    images in both {one} and {other}: {len(pairs)}{example}")
    if options.names:
        return 0
    print(f"data sets lie in {data_root()} (LOGIT_BIAS_DATA)")
    for name in datasets.names():
        try:
            data = datasets.load(name)
            splits = "test only: use as test=" if tuple(data.splits) == ("test",) else ", ".join(data.splits)
            print(f"  {name:20} here: {len(data.classnames)} classes, {splits}")
        except ValueError as error:
            print(f"  {name:20} missing: {str(error).removeprefix(f'{name}: ')}")
    print(f"  and {datasets.GRAMMAR}")
    return 0


def _extract(options: argparse.Namespace) -> int:
    from lib import features
    from lib.features import datasets

    chosen = ("views", "device", "precision", "batch_size", "num_workers", "quarantine")
    how = {name: getattr(options, name) for name in chosen}
    for split in options.splits or datasets.load(options.dataset).splits:
        for part in features.load_many(options.dataset, split, options.encoders, **how):
            left_out = f", {len(part.quarantined)} left out" if part.quarantined else ""
            size, digest = tuple(part.x.shape), part.fingerprint[:16]
            print(f"{options.dataset}, {split}, {part.encoder}: {size}{left_out}  {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
