"""Collect the gallery from the runs of the whole workbook: `make figures`, or `python figures/collect.py RUNS`."""

import sys
from pathlib import Path

from lib import runs
from lib.files import ROOT, replace_file, write_json

BENCH = "bench"  # tests/bench.py, whose run lies beside those of the notebooks


def collect(folder: Path, gallery: Path = ROOT / "figures") -> list[str]:
    """Names of the gallery's figures, copied from one run of the whole workbook; `index.json` says where each is from.

    Refused unless all notebooks ran with their defaults at this commit. Figures that no run drew are removed; the
    benchmark's stays where it has not run again.
    """
    here = runs.commit()
    wanted = {name: {k: v for k, (_, v) in runs.declared(name).items()} for name in runs.notebooks()}
    records = {path.parent.name: runs.read_json(path) for path in folder.glob("*/metrics.json")}
    wanted |= {BENCH: {"quick": False}} if BENCH in records else {}
    problems = [] if here and not here.endswith("+") else ["files differ from the commit"]
    for name, defaults in wanted.items():
        if (record := records.get(name)) is None:
            problems.append(f"{name} has not finished")
        elif record["commit"].endswith("+") or (record["commit"] != here and name != BENCH):
            problems.append(f"{name} ran at {record['commit'] or 'no commit'}, not {here}")
        elif other := [f"{k}={v!r}" for k, v in record["parameters"].items() if (k, v) not in defaults.items()]:
            problems.append(f"{name} ran with {', '.join(other)}")
    if problems:
        raise ValueError(f"no gallery from {folder}: {'; '.join(problems)}")
    path = gallery / "index.json"
    index = runs.read_json(path) if path.exists() and BENCH not in records else {}
    index = {name: entry for name, entry in index.items() if entry["notebook"] == BENCH}
    for name in wanted:
        for drawn in sorted((folder / name / "figures").glob("*.[ps][nv]g")):
            replace_file(gallery / drawn.name, lambda stream, drawn=drawn: stream.write(drawn.read_bytes()))
            index[drawn.stem] = {k: records[name][k] for k in ("notebook", "parameters", "commit", "fingerprints")}
    for old in (p for p in gallery.glob("*.[ps][nv]g") if p.stem not in index):
        old.unlink()
    write_json(path, dict(sorted(index.items())))
    return sorted(index)


if __name__ == "__main__":
    try:
        print(f"figures/: {', '.join(collect(Path(*sys.argv[1:2] or ['runs'])))}")
    except ValueError as error:
        sys.exit(f"error: {error}")
