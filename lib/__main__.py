"""The workbook's command line: `python -m lib --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lib import runs

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


if __name__ == "__main__":
    sys.exit(main())
