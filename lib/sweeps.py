"""Sweeps: a small YAML file to runs, each in a folder named by its parameters; what became of them.

    out: runs/methods                     # where the runs go
    blocks:
      - notebook: 05_tune_amu
        seeds: 3                          # draws of the support in each run
        fixed: {epochs: 50}               # parameters that all runs of the block share
        grid:                             # one run for each combination
          dataset: [shapes, digits]
          shots: [1, 4, 16]
    extract:                              # optional: features encoded before any run, by so many jobs side by side
      - {dataset: shapes, encoders: [embedded:clip, embedded:texture], jobs: 4}

`snakemake --cores 2 --configfile sweeps/NAME.yaml` runs it. The run of digits at 4 shots lies in
`OUT/05_tune_amu/dataset=digits/shots=4/`. Snakemake is told what runs there are, and does the rest.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from urllib.parse import quote

from lib.files import nearest
from lib.runs import check_parameters, notebook_path, read_json

BLOCK = ("notebook", "seeds", "fixed", "grid")
EXTRACT = {"dataset": str, "encoders": list, "jobs": int}
LONGEST = 100  # letters of a value in a folder's name


@dataclass(frozen=True)
class Block:
    """Runs of one notebook over a grid: what each is labelled by, and the parameters it is given."""

    notebook: str
    labels: list[dict[str, str]]  # one per run, of the values of its grid
    parameters: list[dict[str, object]]


def blocks(config: Mapping[str, object]) -> list[Block]:
    """Blocks of a sweep, every run's parameters checked.

    Raises:
        ValueError: a key, notebook or parameter that does not exist, a value of the wrong type, a grid that is no list
            of values, or a parameter given twice in one block.
    """
    _refuse_others("a sweep", config, ("out", "blocks", "extract"))
    if not isinstance(config["blocks"], list) or not config["blocks"]:
        raise ValueError("blocks must be a list with an entry for each notebook")
    return [_block(number, entry) for number, entry in enumerate(config["blocks"], start=1)]


def _block(number: int, entry: object) -> Block:
    where = f"block {number}"
    _refuse_others(where, entry, BLOCK)
    if "notebook" not in entry:
        raise ValueError(f"{where} names no notebook")
    notebook, grid, fixed = notebook_path(entry["notebook"]).stem, entry.get("grid") or {}, entry.get("fixed") or {}
    seeds = {"seeds": entry["seeds"]} if "seeds" in entry else {}
    if twice := [name for name in (*fixed, *seeds) if name in grid or (name in fixed and name in seeds)]:
        raise ValueError(f"{where}: {twice[0]} is given twice")
    if not grid:
        raise ValueError(f"{where} has no grid, so no runs; a single one is python -m lib run {notebook}")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: the grid of {name} must be a list of values, not {values!r}")
        if len({label(value) for value in values}) < len(values):
            raise ValueError(f"{where}: the grid of {name} has a value twice: {values}")
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    parameters = [fixed | seeds | combination for combination in combinations]
    for one in parameters:
        check_parameters(notebook, one)
    return Block(notebook, [{name: label(value) for name, value in c.items()} for c in combinations], parameters)


def label(value: object) -> str:
    """A value as part of a folder's name; what a file name or Snakemake could not hold is percent-encoded."""
    text = quote(str(value), safe=",:@+=")
    return text if len(text) <= LONGEST else f"{text[-LONGEST:]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def extractions(config: Mapping[str, object]) -> dict[str, list[str]]:
    """Words for `python -m lib` of every job that encodes images before the runs, by the job's name."""
    jobs = {}
    for number, entry in enumerate(config.get("extract") or [], start=1):
        where = f"extraction {number}"
        _refuse_others(where, entry, EXTRACT)
        for name, type_ in EXTRACT.items():
            if type(entry.get(name, 1)) is not type_:
                raise ValueError(f"{where}: {name} must be {type_.__name__}, not {entry.get(name)!r}")
        words = ["extract", entry["dataset"], *entry["encoders"]]
        jobs |= {f"{label(entry['dataset'])}-{number}-{part}": words for part in range(1, entry.get("jobs", 1) + 1)}
    return jobs


def _refuse_others(where: str, entry: object, names: Iterable[str]) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be keys and values, not {entry!r}")
    for name in entry:
        if name not in names:
            raise ValueError(f"{where} has no {name!r}; {nearest(name, names)}")


def forecast(folders: Mapping[Path, str]) -> str:
    """Table of what would run and how long it took last time: `folders` maps a run's folder to its notebook.

    A run that never finished is expected to take as long as the median of its notebook's other runs here.
    """
    seconds = {f: read_json(f / "metrics.json")["seconds"] for f in folders if (f / "metrics.json").exists()}
    usual = {n: [s for f, s in seconds.items() if folders[f] == n] for n in set(folders.values())}
    lines, total = [], 0.0
    for folder, notebook in folders.items():
        if folder in seconds:
            lines.append(f"  {folder}: finished, took {seconds[folder]:.0f} s")
        elif usual[notebook]:
            total += median(usual[notebook])
            lines.append(f"  {folder}: to run, others of {notebook} took {median(usual[notebook]):.0f} s")
        else:
            lines.append(f"  {folder}: to run, never timed")
    left = f"{len(folders) - len(seconds)} of {len(folders)} to run, {total / 60:.0f} min of one core or more"
    return "\n".join([*lines, left])


def failures(folders: Iterable[Path]) -> str:
    """Runs that began and did not finish, a line each with its error; empty where there are none."""
    begun = [f for f in folders if (f / "unfinished.ipynb").exists() or (f / "error.txt").exists()]
    if not begun:
        return ""
    lines = [f"  {f}: {_error(f)}" for f in begun]
    return "\n".join([f"{len(begun)} runs did not finish (what there is of each: its unfinished.ipynb):", *lines])


def _error(folder: Path) -> str:
    why = folder / "error.txt"
    return why.read_text(encoding="utf-8").strip() if why.exists() else "ended without a word: killed, or out of memory"
