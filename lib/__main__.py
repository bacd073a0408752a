"""The workbook's command line: `python -m lib --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lib import runs
from lib.files import data_root  # the modules that load torch are imported by the commands that need them

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m lib", description="What makes a logit bias effective?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute a notebook headless and keep its record")
    run.add_argument("notebook", help="its name, 05_tune_amu")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    run.add_argument("--folder", type=Path, help="where the run goes (default: runs/NOTEBOOK)")
    run.add_argument("--figures", type=Path, help="where the figures go as well")
    run.add_argument("--lenient", action="store_true", help="leave out parameters that this notebook does not have")
    run.set_defaults(command=_run)

    summary = commands.add_parser("summary", help="print the table of the last run of notebook 05")
    summary.add_argument("folder", type=Path, nargs="?", default=Path("runs"))
    summary.set_defaults(command=_summary)

    encoders = commands.add_parser("encoders", help="list the encoders by name")
    encoders.add_argument("parts", nargs="*", help="show names that contain all of these, such as: timm dino")
    encoders.set_defaults(command=_encoders)

    data = commands.add_parser("datasets", help="say which data sets are here, and how to get the others")
    data.add_argument("names", nargs="*", help="describe these, folder:PATH included, and look for leaks")
    data.add_argument("--download", metavar="NAME", help="let torchvision download the images of a benchmark")
    data.set_defaults(command=_datasets)

    extract = commands.add_parser("extract", help="fill the cache of features; resumes where it was stopped")
    extract.add_argument("dataset", help="dtd, folder:PATH, imagenet@16/1, …")
    extract.add_argument("encoders", nargs="+", help="several share one pass over the images")
    extract.add_argument("--splits", nargs="+", help="(default: all that the data set has)")
    extract.add_argument(
        "--views", type=int, default=1, help="random crops and flips of each image; 1 is the plain image"
    )
    extract.add_argument("--device", default="auto", help="auto, cuda, mps, cpu")
    extract.add_argument("--precision", default="fp32", help="fp32 or bf16")
    extract.add_argument("--batch-size", type=int, default=64, help="network inputs at once (default: 64)")
    extract.add_argument("--num-workers", type=int, default=0, help="decoding processes (default: 0, decode here)")
    extract.add_argument("--quarantine", action="store_true", help="leave out images that cannot be decoded")
    extract.set_defaults(command=_extract)

    bring = commands.add_parser("import", help="turn somebody's cache folder into a bank, features:TARGET")
    bring.add_argument("kind", choices=("tip-adapter", "amu", "npz"))
    bring.add_argument("source", type=Path, help="a folder, or an npz file")
    bring.add_argument("target", type=Path, help="a new folder")
    bring.add_argument("--shots", type=int, default=16, help="which keys_Kshots.pt (default: 16)")
    bring.add_argument("--classes", type=Path, help="a text file, one class name a line, in label order")
    bring.add_argument("--clip-keys", type=Path, help="amu: a Tip-Adapter keys_Kshots.pt of the same images")
    bring.add_argument("--aux", type=Path, help="npz: the auxiliary encoder's file")
    bring.set_defaults(command=_import)

    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    notebook = runs.notebook_path(options.notebook).stem
    known = runs.declared(notebook)
    given = {name: _typed(value, known.get(name)) for name, value in options.p if not options.lenient or name in known}
    runs.check_parameters(notebook, given)
    folder = options.folder or runs.ROOT / "runs" / notebook
    record = runs.execute(notebook, given, folder, options.figures)
    print(f"{notebook}: {record['seconds']} s -> {folder}")
    return 0


def _typed(text: str, declared: tuple[type, object] | None) -> object:
    """Return a command-line text as the type its parameter has; as it stands where it does not fit, to be refused."""
    if declared is None or declared[0] is str:
        return text
    if declared[0] is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return declared[0](text)
    except ValueError:
        return text


def _summary(options: argparse.Namespace) -> int:
    path = options.folder / "05_tune_amu" / "metrics.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: notebook 05 has not finished")
    record = next(r for r in runs.read_records(path.parent) if r["notebook"] == "05_tune_amu")
    given, table = record["parameters"], record["metrics"]["accuracy"]
    shots = sorted({int(k) for row in table.values() for k in row})
    print(f"\nTest accuracy in % on {given['dataset']}, mean and 95 % interval over {given['seeds']} seeds,")
    print(f"hyper-parameters chosen by protocol '{given['protocol']}'\n")
    print(f"{'shots':24}" + "".join(f"{k:>15}" for k in shots))
    for title, row in table.items():
        cells = (row[str(k)] for k in shots)
        print(f"{title:24}" + "".join(f"{c['mean']:>9.1f} ± {c['half']:<3.1f}" for c in cells))
    print(f"\nfigures: figures/    executed notebooks: {options.folder}/NN_name/NN_name.ipynb\n")
    return 0


def _encoders(options: argparse.Namespace) -> int:
    from lib.features import recipes

    found = [name for name in recipes.listed() if all(part.lower() in name.lower() for part in options.parts)]
    print("\n".join(found))
    print(f"{len(found)} encoders; names are {recipes.GRAMMAR}", file=sys.stderr)
    return 0


def _datasets(options: argparse.Namespace) -> int:
    from lib.features import datasets, sources

    root = data_root()
    if options.download:
        sources.download(options.download, root)
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
    print(f"data sets lie in {root} (LOGIT_BIAS_DATA)")
    for name in datasets.names():
        try:
            data = datasets.load(name)
            print(f"  {name:20} here: {len(data.classnames)} classes, {', '.join(data.splits)}")
        except ValueError as error:
            print(f"  {name:20} missing: {str(error).removeprefix(f'{name}: ')}")
    print(f"  and {datasets.GRAMMAR}")
    return 0


def _extract(options: argparse.Namespace) -> int:
    from lib import features
    from lib.features import datasets

    for split in options.splits or datasets.load(options.dataset).splits:
        found = features.load_many(
            options.dataset,
            split,
            options.encoders,
            views=options.views,
            device=options.device,
            precision=options.precision,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            quarantine=options.quarantine,
        )
        for bank in found:
            left_out = f", {len(bank.quarantined)} left out" if bank.quarantined else ""
            print(
                f"{options.dataset}, {split}, {bank.backbone}: {tuple(bank.x.shape)}{left_out}  {bank.fingerprint[:16]}"
            )
    return 0


def _import(options: argparse.Namespace) -> int:
    sys.path.insert(0, str(runs.ROOT / "data"))
    import import_cache as features

    names = options.classes.read_text(encoding="utf-8").splitlines() if options.classes else None
    if names is None and options.kind != "npz":
        raise ValueError(f"{options.kind} folders hold no class names: give --classes FILE")
    if options.kind == "npz":
        features.import_npz(options.source, options.target, aux=options.aux, class_names=names)
    elif options.kind == "amu":
        features.import_amu(
            options.source, options.target, shots=options.shots, class_names=names, clip_keys=options.clip_keys
        )
    else:
        features.import_tip_adapter(options.source, options.target, shots=options.shots, class_names=names)
    print(f"features:{options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
