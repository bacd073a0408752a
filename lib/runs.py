"""Runs: parameters checked, notebooks executed by papermill, records written.

A run is a folder with the executed notebook, its figures and `metrics.json`. The record is written last and in one
step, so a folder without it is a run that did not finish, whatever the notebook inside says of itself.

    python -m lib run 05_tune_amu -p dataset digits -p seeds 5
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lib.files import ROOT, nearest, replace_file, write_json

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


NOTEBOOKS = ROOT / "notebooks"
VERSIONED = ("torch", "open_clip_torch", "timm", "numpy", "scikit-learn", "papermill")
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
BENCH = "bench"  # tests/bench.py, whose run lies beside those of the notebooks
TIMEOUT_S = 3600  # per cell; a cell that takes longer hangs


def notebook_path(name: str) -> Path:
    """Path of a notebook named with or without `.ipynb`."""
    path = NOTEBOOKS / f"{Path(name).name.removesuffix('.ipynb')}.ipynb"
    if not path.exists():
        raise ValueError(f"no notebook {path.stem!r}; {nearest(path.stem, notebooks())}")
    return path


def notebooks() -> list[str]:
    """Names of all notebooks, in their order."""
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def declared(notebook: str) -> dict[str, tuple[type, object]]:
    """Type and default of each parameter, read from the cell tagged `parameters`.

    Every line of that cell is an annotated literal, `shots: int = 16  # images per class`.
    """
    cells = json.loads(notebook_path(notebook).read_text(encoding="utf-8"))["cells"]
    tagged = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook}: needs one cell tagged 'parameters', has {len(tagged)}")
    return {
        line.target.id: (TYPES[line.annotation.id], ast.literal_eval(line.value))
        for line in ast.parse(tagged[0]).body
        if isinstance(line, ast.AnnAssign)
    }


def check_parameters(notebook: str, given: Mapping[str, object]) -> dict[str, object]:
    """All parameters of a run: the given ones over the declared defaults.

    Raises:
        ValueError: a parameter is unknown or has another type than its default.
    """
    parameters = declared(notebook)
    for name, value in given.items():
        if name not in parameters:
            raise ValueError(f"{notebook} has no parameter {name!r}; {nearest(name, parameters)}")
        wanted = parameters[name][0]
        fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{notebook}: {name} must be {wanted.__name__}, not {type(value).__name__} {value!r}")
    return {name: type_(given.get(name, default)) for name, (type_, default) in parameters.items()}


def commit() -> str:
    """Commit of the workbook, with `+` where files differ from it, the gallery aside; empty outside a checkout."""
    commands = ["rev-parse", "HEAD"], ["status", "--porcelain", "--", ".", ":(exclude)figures"]
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + "+" * bool(changes)


@dataclass(frozen=True)
class Run:
    """One execution of a notebook, from its checked parameters to its record; `commit` names the code that runs."""

    notebook: str
    parameters: Mapping[str, object]
    folder: Path
    started: float = field(default_factory=time.time)
    commit: str = field(default_factory=commit)

    def save_figure(self, fig: Figure, name: str, gallery: bool = True) -> None:
        """Save a figure as `NN_name`; `gallery` is False for figures of times, which no two runs draw alike."""
        from lib.figures import save_figure

        save_figure(fig, f"{self.notebook[:2]}_{name}", self.folder / ("figures" if gallery else "own"))

    def record(
        self, metrics: Mapping[str, object], fingerprints: Mapping[str, str] | None = None, **facts: object
    ) -> None:
        """Write `metrics.json`, last and in one step; NaN, a quantity that does not exist, becomes null.

        Raises:
            ValueError: a number is infinite.
        """
        import torch

        record = {
            "notebook": self.notebook,
            "parameters": dict(self.parameters),
            "metrics": dict(metrics),
            "fingerprints": dict(fingerprints or {}),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in VERSIONED},
            "commit": self.commit,
            "seconds": round(time.time() - self.started, 1),
            **facts,
        }
        write_json(self.folder / "metrics.json", _without_nan(record))


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def start(notebook: str, namespace: MutableMapping[str, object]) -> Run:
    """Begin a run from inside its notebook: check the parameters and clear away an older record and its figures.

    Args:
        namespace: the notebook's `globals()`. An int that papermill made of a text (`-p templates 7`) is put back.

    Raises:
        ValueError: a parameter is mistyped or unknown (papermill itself only warns).
    """
    types = {name: type_ for name, (type_, _) in declared(notebook).items()}
    given = {name: namespace[name] for name in types if name in namespace}
    for source in namespace.get("In", []):
        if source.startswith("# Parameters"):  # the cell that papermill injects
            given |= {t.id: namespace[t.id] for line in ast.parse(source).body for t in getattr(line, "targets", [])}
    given = {name: str(v) if types.get(name) is str and type(v) is int else v for name, v in given.items()}
    parameters = check_parameters(notebook, given)
    namespace.update(parameters)
    warnings.filterwarnings("ignore", "IProgress not found")  # progress is plain text here, widgets are not wanted
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(os.environ.get("LOGIT_BIAS_RUN") or ROOT / "runs" / "by-hand" / f"{notebook}-{digest}")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / "metrics.json", *(folder / "figures").glob(f"{notebook[:2]}_*")):
        stale.unlink(missing_ok=True)
    print(f"{notebook} -> {os.path.relpath(folder, ROOT)}")
    for name, value in parameters.items():
        print(f"  {name} = {value!r}")
    return Run(notebook, parameters, folder)


def execute(notebook: str, parameters: Mapping[str, object], folder: Path, attempts: int = 3) -> dict:
    """Record of a notebook executed headless into a folder; only a kernel that fails to start is started again.

    Raises:
        ValueError: a parameter is unknown or mistyped; nothing has been touched then.
        RuntimeError: the notebook ended without a record.
    """
    import papermill

    checked = check_parameters(notebook, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    os.environ["LOGIT_BIAS_RUN"] = str(folder.resolve())
    os.environ["LOGIT_BIAS_CWD"] = str(Path.cwd())  # the kernel runs in ROOT; relative paths are the caller's
    output = folder / f"{notebook}.ipynb"
    options = {"kernel_name": "python3", "cwd": str(ROOT), "progress_bar": sys.stderr.isatty()}
    options |= {"execution_timeout": TIMEOUT_S, "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
    for attempt in range(1, attempts + 1):
        try:
            papermill.execute_notebook(str(notebook_path(notebook)), str(output), checked, **options)
            break
        except RuntimeError as error:  # nbclient: the kernel died before it replied
            if "Kernel died before replying" not in str(error) or attempt == attempts:
                raise
    record = folder / "metrics.json"
    if not record.exists():
        raise RuntimeError(f"{notebook} ended without a record; see {output}")
    return json.loads(record.read_text(encoding="utf-8"))


def read_records(folder: Path) -> list[dict]:
    """Records of all finished runs below a folder, in the order of their paths."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("metrics.json"))]


def fill_gallery(folder: Path, gallery: Path = ROOT / "figures") -> list[str]:
    """Copy the figures of a run of the whole workbook into the gallery; `index.json` says where each comes from.

    Figures that no run drew are removed; the benchmark's stays where it has not run again.

    Raises:
        ValueError: uncommitted changes; a notebook not finished, of another commit or with other than its defaults.
    """
    here, wanted = commit(), {name: {k: v for k, (_, v) in declared(name).items()} for name in notebooks()}
    records = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/metrics.json")}
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
    index = json.loads(path.read_text(encoding="utf-8")) if path.exists() and BENCH not in records else {}
    index = {name: entry for name, entry in index.items() if entry["notebook"] == BENCH}
    for name in wanted:
        for drawn in sorted((folder / name / "figures").glob("*.[ps][nv]g")):
            replace_file(gallery / drawn.name, lambda stream, drawn=drawn: stream.write(drawn.read_bytes()))
            index[drawn.stem] = {k: records[name][k] for k in ("notebook", "parameters", "commit", "fingerprints")}
    for old in (p for p in gallery.glob("*.[ps][nv]g") if p.stem not in index):
        old.unlink()
    write_json(path, dict(sorted(index.items())))
    return sorted(index)


def published_backbone(encoder: str) -> str:
    """Name under which tables publish one of OpenAI's image towers, `RN50` or `ViT-B/16`; else ``.

    An encoder's name counts (`open_clip:ViT-B-16-quickgelu/openai`) and so does a bank's file name (`clip_vit_b16`).
    """
    tower = r"(?:RN|ViT[_-]?([BL])[_-]?)(\d+)"
    parts = re.fullmatch(f"open_clip:{tower}(?:-quickgelu)?/openai", encoder)
    parts = parts or re.fullmatch(f"clip[_-]{tower}", encoder, re.IGNORECASE)
    if not parts:
        return ""
    size, number = parts.groups()
    return f"ViT-{size.upper()}/{number}" if size else f"RN{number}"


def join_published(ours: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Our accuracies beside the published ones of the same method, data set, backbone and number of shots.

    Args:
        ours: one row per result: `method` (as titled in `methods.METHODS`), `dataset`, `backbone` (as published),
            `shots` and `mean`, in %.
        published: rows of data/published.csv. Zero-shot CLIP stands there at 0 shots and is compared at any.

    Returns:
        The rows that agree, with `value`, `source`, `table` and `difference` (ours - published, in points).
    """
    theirs = published[published["metric"] == "accuracy"].replace({"method": {"LP-CLIP": "Linear probe"}})
    theirs = theirs.astype({"shots": int})[["source", "table", "method", "dataset", "clip_backbone", "shots", "value"]]
    theirs = theirs.rename(columns={"clip_backbone": "backbone"})
    keys = ["method", "dataset", "backbone", "shots"]
    compared = ours.assign(shots_run=ours["shots"], shots=ours["shots"].where(ours["method"] != "Zero-shot CLIP", 0))
    joined = compared.merge(theirs, on=keys).assign(difference=lambda rows: rows["mean"] - rows["value"])
    return joined.assign(shots=joined["shots_run"]).drop(columns="shots_run")
