"""Runs: parameters checked, notebooks executed by papermill, records written.

A run is a folder with the executed notebook and `metrics.json`. The record is written last and in one step, so a
folder without it is a run that did not finish, whatever the notebook inside says of itself.

    python -m lib run 05_tune_amu -p dataset digits -p seeds 5
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lib.files import ROOT, write_json

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


NOTEBOOKS = ROOT / "notebooks"
VERSIONED = ("torch", "open_clip_torch", "timm", "numpy", "scikit-learn", "papermill")
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
TIMEOUT_S = 3600  # per cell; a cell that takes longer hangs


def notebook_path(name: str) -> Path:
    """Return the path of a notebook named with or without `.ipynb`.

    Raises:
        ValueError: there is none of that name.
    """
    path = NOTEBOOKS / f"{Path(name).name.removesuffix('.ipynb')}.ipynb"
    if not path.exists():
        known = sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb"))
        raise ValueError(f"no notebook {path.stem!r}; known: {', '.join(known)}")
    return path


def declared(notebook: str) -> dict[str, tuple[type, object]]:
    """Return type and default of each parameter, read from the cell tagged `parameters`.

    Every line of that cell is an annotated literal, `shots: int = 16  # images per class`.
    """
    cells = json.loads(notebook_path(notebook).read_text())["cells"]
    tagged = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook}: needs one cell tagged 'parameters', has {len(tagged)}")
    return {
        line.target.id: (TYPES[line.annotation.id], ast.literal_eval(line.value))
        for line in ast.parse(tagged[0]).body
        if isinstance(line, ast.AnnAssign)
    }


def check_parameters(notebook: str, given: Mapping[str, object]) -> dict[str, object]:
    """Return all parameters of a run: the given ones over the declared defaults.

    Raises:
        ValueError: a parameter is unknown or has another type than its default.
    """
    known = declared(notebook)
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{notebook} has no parameter {name!r}; {hint}known: {', '.join(known)}")
        wanted = known[name][0]
        fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{notebook}: {name} must be {wanted.__name__}, not {type(value).__name__} {value!r}")
    return {name: type_(given.get(name, default)) for name, (type_, default) in known.items()}


@dataclass(frozen=True)
class Run:
    """One execution of a notebook, from its checked parameters to its record."""

    notebook: str
    parameters: Mapping[str, object]
    folder: Path
    started: float = field(default_factory=time.time)

    def save_figure(self, fig: Figure, name: str, shared: bool = True) -> None:
        """Save a figure as `NN_name`: beside the record, and in the folder that `LOGIT_BIAS_FIGURES` names.

        Args:
            shared: False for figures of times, which no two runs draw alike and which stay beside the record.
        """
        from lib.figures import save_figure

        full = f"{self.notebook[:2]}_{name}"
        save_figure(fig, full, self.folder / "figures")
        if shared and os.environ.get("LOGIT_BIAS_FIGURES"):
            save_figure(fig, full, Path(os.environ["LOGIT_BIAS_FIGURES"]))

    def record(
        self, metrics: Mapping[str, object], fingerprints: Mapping[str, str] | None = None, **facts: object
    ) -> Path:
        """Write `metrics.json`, last and in one step.

        Args:
            metrics: the numbers this run is about; NaN and infinity are refused.
            fingerprints: of the features that were used.
            facts: anything else to keep, such as the protocol.
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
            "commit": commit(),
            "seconds": round(time.time() - self.started, 1),
            **facts,
        }
        return write_json(self.folder / "metrics.json", record)


def start(notebook: str, namespace: Mapping[str, object]) -> Run:
    """Begin a run from inside its notebook: check the parameters and clear away an older record.

    Args:
        namespace: the notebook's `globals()`.

    Raises:
        ValueError: a parameter is mistyped, or papermill was given one that the notebook does not have
            (papermill itself only warns).
    """
    given = {name: namespace[name] for name in declared(notebook) if name in namespace}
    for source in namespace.get("In", []):
        if source.startswith("# Parameters"):  # the cell that papermill injects
            given |= {t.id: namespace[t.id] for line in ast.parse(source).body for t in getattr(line, "targets", [])}
    parameters = check_parameters(notebook, given)
    warnings.filterwarnings("ignore", "IProgress not found")  # progress is plain text here, widgets are not wanted
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(os.environ.get("LOGIT_BIAS_RUN") or ROOT / "runs" / "by-hand" / f"{notebook}-{digest}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    print(f"{notebook} -> {os.path.relpath(folder, ROOT)}")
    for name, value in parameters.items():
        print(f"  {name} = {value!r}")
    return Run(notebook, parameters, folder)


def execute(
    notebook: str, parameters: Mapping[str, object], folder: Path, figures: Path | None = None, attempts: int = 3
) -> dict:
    """Execute a notebook headless and return its record.

    Args:
        folder: gets the executed notebook, its figures and `metrics.json`.
        figures: where the figures go as well.
        attempts: how often a kernel that fails to start is started; a notebook that fails is not repeated.

    Raises:
        ValueError: a parameter is unknown or mistyped; nothing has been touched then.
        RuntimeError: the notebook ended without a record.
    """
    import papermill

    checked = check_parameters(notebook, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    os.environ["LOGIT_BIAS_RUN"] = str(folder.resolve())
    os.environ["LOGIT_BIAS_FIGURES"] = str(figures.resolve()) if figures else ""
    output = folder / f"{notebook}.ipynb"
    for attempt in range(1, attempts + 1):
        try:
            papermill.execute_notebook(
                str(notebook_path(notebook)),
                str(output),
                parameters=checked,
                kernel_name="python3",
                cwd=str(ROOT),
                progress_bar=sys.stderr.isatty(),
                execution_timeout=TIMEOUT_S,
                extra_arguments=["--IPKernelApp.log_level=ERROR"],
            )
            break
        except RuntimeError as error:  # nbclient: the kernel died before it replied
            if "Kernel died before replying" not in str(error) or attempt == attempts:
                raise
    record = folder / "metrics.json"
    if not record.exists():
        raise RuntimeError(f"{notebook} ended without a record; see {output}")
    return json.loads(record.read_text())


def read_records(folder: Path) -> list[dict]:
    """Return the records of all finished runs below a folder, in the order of their paths."""
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("metrics.json"))]


def commit() -> str:
    """Return the commit of the workbook, with `+` when files differ from it; empty outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def interval_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return mean accuracy and half-width of its 95 % interval over seeds, in %, per label and number of shots."""
    import pandas as pd

    from lib.statistics import mean_interval

    rows = [
        {"label": label, "shots": shots, "mean": 100 * mean, "half": 100 * half}
        for (label, shots), group in results.groupby(["label", "shots"], sort=False)
        for mean, half in [mean_interval(group["accuracy"])]
    ]
    return pd.DataFrame(rows)


def published_backbone(encoder: str) -> str:
    """Return the name under which tables publish one of OpenAI's image towers, `RN50` or `ViT-B/16`; else ``.

    An encoder's name counts (`open_clip:ViT-B-16-quickgelu/openai`) and so does a bank's file name (`clip_vit_b16`).
    """
    found = re.fullmatch(r"open_clip:(RN\d+|ViT-[BL]-\d+)(?:-quickgelu)?/openai", encoder)
    found = found or re.fullmatch(r"clip[_-](RN\d+|ViT[_-]?[BL][_-]?\d+)", encoder, re.IGNORECASE)
    if not found:
        return ""
    kind, size, patch = re.fullmatch(r"(RN|VIT)[_-]?([BL]?)[_-]?(\d+)", found[1].upper()).groups()
    return f"RN{patch}" if kind == "RN" else f"ViT-{size}/{patch}"


def join_published(ours: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Put our accuracies beside the published ones of the same method, data set, backbone and number of shots.

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
    asked = ours.assign(shots_run=ours["shots"], shots=ours["shots"].where(ours["method"] != "Zero-shot CLIP", 0))
    joined = asked.merge(theirs, on=keys).assign(difference=lambda rows: rows["mean"] - rows["value"])
    return joined.assign(shots=joined["shots_run"]).drop(columns="shots_run")
