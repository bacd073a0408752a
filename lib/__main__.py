"""The workbook's command line: `python -m lib --help`."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from lib import runs
from lib.files import data_root  # the modules that load torch are imported by the commands that need them

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def main(arguments: list[str] | None = None) -> int:
    """Exit code of one command."""
    parser = argparse.ArgumentParser(prog="python -m lib", description="What makes a logit bias effective?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(call: Callable[..., None], about: str) -> Callable:
        added = commands.add_parser(call.__name__.strip("_"), help=about)
        added.set_defaults(command=call)
        return added.add_argument

    add = command(_run, "execute a notebook headless and keep its record")
    add("notebook", help="its name, 05_tune_amu")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    add("--folder", type=Path, help="where the run goes (default: runs/NOTEBOOK)")
    add("--lenient", action="store_true", help="leave out parameters that this notebook does not have")
    add = command(_summary, "print the table of the last run of notebook 05")
    add("folder", type=Path, nargs="?", default=Path("runs"))
    add = command(_results, "gather the records of runs into one table, results.parquet and results.csv")
    add("folders", type=Path, nargs="*", default=[Path("runs")], help="folders of runs (default: runs)")
    add("--to", type=Path, help="folder of the table (default: the first of these)")
    add = command(_encoders, "list the encoders by name")
    add("parts", nargs="*", help="show names that contain all of these, such as: timm dino")
    add = command(_datasets, "say which data sets are here, and how to get the others")
    add("names", nargs="*", help="describe these, folder:PATH included, and look for leaks")
    add = command(_start, "look at a folder of images, write its splits to a table, extract")
    add("folder", type=Path, help="a sub-folder per class, or train/, val/, test/ above them")
    add("--table", type=Path, help="where the splits are kept, to be edited (default: FOLDER.csv beside it)")
    _encoder_options(add)
    add = command(_fit, "fit a method on a data set and save it")
    add("dataset", help="csv:PATH, folder:PATH, dtd, …")
    add("--method", default="amu", help="amu, gda@aux for GDA on the second encoder, … (default: amu)")
    add("--to", type=Path, required=True, help="folder of the saved method")
    add("--shots", default="all", help="labelled images of a class to learn from (default: all)")
    add("--seed", type=int, default=1, help="draws them (default: 1)")
    add("--val-shots", type=int, default=4, help="images of a class to choose on, never more than shots (default: 4)")
    add("--protocol", default="val", help="how hyper-parameters are chosen: val, fixed or oracle (default: val)")
    add("--templates", default="auto", help="prompts: auto, 7, 80 or a file")
    _encoder_options(add)
    add = command(_predict, "classify images by a saved method; continues where it was stopped")
    add("folder", type=Path, help="of the saved method")
    add("images", nargs="+", help="files and folders")
    add("--out", type=Path, default=Path("predictions.csv"), help="(default: predictions.csv)")
    add("--encoders", nargs="+", default=[], help="names of the encoders' files now, CLIP's first, if they have moved")
    add("--device", default="auto", help="auto, cuda, mps, cpu")
    add = command(_extract, "fill the cache of features; resumes where it was stopped")
    add("dataset", help="dtd, folder:PATH, imagenet@16/1, …")
    add("encoders", nargs="+", help="several share one pass over the images")
    add("--splits", nargs="+", help="(default: all that the data set has)")
    add("--views", type=int, default=1, help="random crops and flips of each image; 1: the plain image")
    add("--device", default="auto", help="auto, cuda, mps, cpu")
    add("--precision", default="fp32", help="fp32 or bf16")
    add("--batch-size", type=int, default=64, help="network inputs at once (default: 64)")
    add("--num-workers", type=int, default=0, help="decoding processes (default: 0, decode here)")
    add("--quarantine", action="store_true", help="leave out images that cannot be decoded")

    options = vars(parser.parse_args(arguments))
    try:
        options.pop("command")(**options)
    except (ValueError, OSError, runs.RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _encoder_options(add: Callable) -> None:
    add("--clip", default="auto", help="CLIP encoder (default: the embedded one)")
    add("--aux", default="auto", help="auxiliary encoder, several joined by commas (default: the embedded one)")
    add("--device", default="auto", help="auto, cuda, mps, cpu")


def _run(notebook: str, p: list[list[str]], folder: Path | None, lenient: bool) -> None:
    notebook = runs.notebook_path(notebook).stem
    types = {name: type_ for name, (type_, _) in runs.declared(notebook).items()}
    parameters = {name: _typed(text, types.get(name, str)) for name, text in p if name in types or not lenient}
    folder = folder or runs.ROOT / "runs" / notebook
    print(f"{notebook}: {runs.execute(notebook, parameters, folder)['seconds']} s -> {folder}")


def _typed(text: str, type_: type) -> object:
    """A command-line text as the type its parameter has; as it stands where it does not fit, to be refused."""
    try:
        return {"true": True, "false": False}.get(text.lower(), text) if type_ is bool else type_(text)
    except ValueError:
        return text


def _summary(folder: Path) -> None:
    import pandas as pd

    records = runs.read_records(folder / "05_tune_amu")
    if not records:
        raise ValueError(f"no metrics.json in {folder / '05_tune_amu'}: notebook 05 has not finished")
    asked, rows = records[0]["parameters"], records[0]["metrics"]["accuracy"]
    cells = {title: {int(k): _interval(**cell) for k, cell in row.items()} for title, row in rows.items()}
    print(f"\nTest accuracy in % on {asked['dataset']}, mean and 95 % interval over {asked['seeds']} seeds, by shots;")
    print(f"hyper-parameters chosen by protocol '{asked['protocol']}'\n")
    print(pd.DataFrame(cells).T.sort_index(axis=1).to_string())
    print(f"\nexecuted notebooks and figures: {folder}/NN_name/\n")


def _results(folders: list[Path], to: Path | None) -> None:
    from lib import records

    gathered = records.table(folders)
    parquet, csv = records.write(gathered, to or folders[0])
    print(f"{len(gathered)} rows of {gathered['run'].nunique()} runs -> {parquet}, {csv.name}")
    print("\n".join(f"  {name:13} {what}" for name, what in records.COLUMNS.items()))


def _interval(mean: float, half: float | None, **_: object) -> str:
    return f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"  # one draw has no interval


def _encoders(parts: list[str]) -> None:
    from lib.features import encoders

    names = [name for name in encoders.listed() if all(part.lower() in name.lower() for part in parts)]
    print("\n".join(names))
    print(f"{len(names)} encoders; names are {encoders.GRAMMAR}", file=sys.stderr)


def _datasets(names: list[str]) -> None:
    from lib.features import datasets

    for name in names:
        data = datasets.load(name)
        splits = {split: data.images(split) for split in data.splits}
        print(f"{name}: {len(data.classnames)} classes, {', '.join(f'{s} {len(x)}' for s, x in splits.items())}")
        print(f"    classes: {', '.join(data.classnames[:5])}, …\n    prompts: {' | '.join(data.templates)}")
        print(f"    {data.source}")
        for one, other in combinations(splits, 2):
            pairs = datasets.shared(splits[one], splits[other])
            example = f", such as {pairs[0][0]} and {pairs[0][1]}" if pairs else ""
            print(f"    images in both {one} and {other}: {len(pairs)}{example}")
    if names:
        return
    print(f"data sets lie in {data_root()} (LOGIT_BIAS_DATA)")
    for name in datasets.names():
        try:
            data = datasets.load(name)
            splits = "test only: use as test=" if tuple(data.splits) == ("test",) else ", ".join(data.splits)
            print(f"  {name:20} here: {len(data.classnames)} classes, {splits}")
        except ValueError as error:
            print(f"  {name:20} missing: {str(error).removeprefix(f'{name}: ')}")
    print(f"  and {datasets.GRAMMAR}")


def _start(folder: Path, table: Path | None, clip: str, aux: str, device: str) -> None:
    from lib.features import sources, survey

    labels, items = sources.folder_items(folder)
    name = folder.resolve().name
    table = table or (folder if folder.name == name else folder.resolve()).with_name(f"{name}.csv")
    counts = [sum(label == c for part in items.values() for _, label in part) for c in labels.values()]
    ends = [f"{list(labels)[counts.index(size)]!r} has {size}" for size in sorted({min(counts), max(counts)})]
    print(f"{folder}: {sum(counts)} images of {len(labels)} classes; {', '.join(ends)}", flush=True)
    if aside := survey.unused(folder, items):
        print(f"  not used: {', '.join(f'{count} {kind}' for kind, count in aside.most_common())}")
    looked = survey.look(folder, items)
    if looked.sizes:
        widths, heights = zip(*looked.sizes.values(), strict=True)
        print(f"  sizes: {min(widths)} to {max(widths)} pixels wide, {min(heights)} to {max(heights)} high")
    print(f"  broken: {len(looked.broken)}", *(f"    {image}: {why}" for image, why in looked.broken.items()), sep="\n")
    kinds = looked.doubles()
    print(f"  the same picture more than once: {sum(map(len, kinds.values()))}")
    for kind, groups in kinds.items():
        print(f"    {kind}: {len(groups)}, such as {' = '.join(image for _, image, _ in groups[0])}")
    if table.exists():
        print(f"{table} is kept as it is; delete it to have it made anew")
    else:
        survey.write_splits(table, sources.folder(folder, looked.left_out))
        aside = f" without the {len(looked.left_out)} broken and doubled ones" if looked.left_out else ""
        print(f"{table}: the splits{aside}; edit it as you like")
    from lib import metrics, tasks

    source = tasks.load_source(f"csv:{table}", clip, aux, device=device)
    print("  " + ", ".join(f"{split} {len(part[0].y)}" for split, part in source.parts.items()))
    if "val" in source.parts:
        val = source.split("val", slice(None))
        accuracy = 100 * metrics.accuracy(val.zero_shot, val.y)
        print(f"zero-shot {source.encoders[0]}: {accuracy:.1f} % of {len(val)} validation images")
    if clip == "auto":
        print("the embedded encoders are a miniature; name real ones by --clip and --aux: python -m lib encoders")
    chosen = [word for name, value in (("--clip", clip), ("--aux", aux)) if value != "auto" for word in (name, value)]
    words = ["fit", f"csv:{table}", *chosen, "--to", f"runs/{name}"]
    print(f"next: python -m lib {shlex.join(words)}")


def _fit(dataset: str, method: str, to: Path, shots: str, seed: int, val_shots: int, protocol: str, **how: str) -> None:
    from scipy.stats import binomtest

    from lib import advice, metrics, saved, tasks

    fitted = advice.build(method, protocol)
    saved.check(fitted, to)
    if shots != "all" and not shots.isdecimal():
        raise ValueError(f"--shots is a number or all, not {shots!r}")
    source = tasks.load_source(dataset, how.pop("clip"), how.pop("aux"), **how)
    largest = int(source.parts["train"][0].y.bincount().max())
    task = tasks.sample(source, *((largest, seed, 0) if shots == "all" else (int(shots), seed, val_shots)))
    fitted.fit(task).save(to)
    print(f"{fitted.entry.title}: fitted on {len(task.support)} images of {task.num_classes} classes")
    if fitted.chosen_:
        on = "the test images: optimistic" if protocol == "oracle" else f"{len(task.val)} validation images"
        chosen = ", ".join(f"{name} {value:g}" for name, value in fitted.chosen_.items())
        print(f"  {chosen}: {100 * fitted.val_accuracy_:.1f} %, chosen on {on}")
    test = task.test
    for name, logits in {"zero-shot": test.zero_shot, method: fitted.logits(test)}.items():
        hits = metrics.correct(logits, test.y, test.classes)[test.y >= 0]
        low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        share = f"{100 * hits.double().mean():.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})"
        print(f"  {name}: {share} of {len(hits)} test images")
    print(f"saved in {to}\nnext: python -m lib predict {shlex.quote(str(to))} IMAGES --out predictions.csv")


def _predict(folder: Path, images: list[str], out: Path, **how: object) -> None:
    from lib.predict import predict

    rows = predict(folder, images, out, **how)
    bad = [row for row in rows if row["reason"]]
    moved = sum(row["class"] != row["zero_shot"] for row in rows if row["zero_shot"])
    print(f"{out}: rows {len(rows)}, of which with another answer than zero-shot CLIP's {moved}")
    print(
        f"images that could not be decoded: {len(bad)}", *(f"  {row['path']}: {row['reason']}" for row in bad), sep="\n"
    )


def _extract(dataset: str, encoders: list[str], splits: list[str] | None, **options: object) -> None:
    from lib import features

    for split in splits or features.datasets.load(dataset).splits:
        for part in features.load_many(dataset, split, encoders, **options):
            left_out = f", {len(part.quarantined)} left out" if part.quarantined else ""
            print(f"{dataset}, {split}, {part.encoder}: {tuple(part.x.shape)}{left_out}  {part.fingerprint[:16]}")


if __name__ == "__main__":
    sys.exit(main())
