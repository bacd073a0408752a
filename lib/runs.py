"""Runs: parameters checked, notebooks executed by papermill, records written.

A run is a folder with the executed notebook, its figures and `metrics.json`. The record is written last and in one
step, so a folder without it is a run that did not finish, whatever the notebook inside says of itself: what there is of
that one lies in `unfinished.ipynb`, and why it ended in `error.txt`. One run at a time has the folder.

    python -m lib run 05_tune_amu -p dataset digits -p seeds 5
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from filelock import FileLock, Timeout

from lib.files import ROOT, commit, locked, nearest, one_line, write_json

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

NOTEBOOKS = ROOT / "notebooks"
VERSIONED = ("torch", "open_clip_torch", "timm", "numpy", "scikit-learn", "papermill")
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
LEAST = {"shots": 1, "seeds": 1, "epochs": 1, "batch_size": 1, "at_once": 1, "bins": 1, "val_shots": 0, "views": 0}
CHOICES = {"protocol": ("val", "fixed", "oracle"), "precision": ("fp32", "bf16")}
FAR = 2.0  # points by which a zero-shot accuracy may differ from the published one without a warning
TIMEOUT_S = 3600  # per cell; a cell that takes longer hangs
_claims: dict[Path, FileLock] = {}  # folders that this kernel fills by hand


class RunFailed(RuntimeError):
    """A notebook did not finish; the message is one line that says where and why."""


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
    cells = read_json(notebook_path(notebook))["cells"]
    tagged = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook}: needs one cell tagged 'parameters', has {len(tagged)}")
    return {
        line.target.id: (TYPES[line.annotation.id], ast.literal_eval(line.value))
        for line in ast.parse(tagged[0]).body
        if isinstance(line, ast.AnnAssign)
    }


def check_parameters(notebook: str, given: Mapping[str, object]) -> dict[str, object]:
    """All parameters of a run: the given ones, if known, of the declared type and in range, over the defaults."""
    parameters = declared(notebook)
    for name, value in given.items():
        if name not in parameters:
            raise ValueError(f"{notebook} has no parameter {name!r}; {nearest(name, parameters)}")
        wanted = parameters[name][0]
        if type(value) is not wanted and (wanted, type(value)) != (float, int):
            raise ValueError(f"{notebook}: {name} must be {wanted.__name__}, not {type(value).__name__} {value!r}")
        if name in LEAST and value < LEAST[name]:
            raise ValueError(f"{notebook}: {name} must be at least {LEAST[name]}, not {value}")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{notebook}: {name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
    return {name: type_(given.get(name, default)) for name, (type_, default) in parameters.items()}


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

    def record(self, metrics: Mapping, fingerprints: Mapping | None = None, **facts: object) -> None:
        """Write `metrics.json`, last and in one step; NaN, a quantity that does not exist, becomes null."""
        torch = sys.modules.get("torch")  # a notebook that has not loaded it computes nothing on a device
        record = {"notebook": self.notebook, "parameters": dict(self.parameters), "metrics": dict(metrics)}
        device, threads = (
            ("cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads()) if torch else ("", 1)
        )
        record |= {"fingerprints": dict(fingerprints or {}), "device": device, "threads": threads}
        record |= {"python": platform.python_version()}
        record |= {"versions": {name: version(name) for name in VERSIONED}, "commit": self.commit}
        record |= {"seconds": round(time.time() - self.started, 1), **facts}
        special = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
        write_json(self.folder / "metrics.json", json.loads(json.dumps(record), parse_constant=special.get))
        if self.folder in _claims:
            _claims.pop(self.folder).release()


def start(notebook: str, namespace: MutableMapping[str, object]) -> Run:
    """Begin a run from inside its notebook: check the parameters and clear away an older record and its figures.

    `namespace` is the notebook's `globals()`. What papermill injects is checked too, as papermill itself only warns of
    an unknown name; an int that it made of a text (`-p templates 7`) is put back.
    """
    types = {name: type_ for name, (type_, _) in declared(notebook).items()}
    values = {name: namespace[name] for name in types if name in namespace}
    for source in namespace.get("In", []):
        if source.startswith("# Parameters"):  # the cell that papermill injects
            values |= {t.id: namespace[t.id] for line in ast.parse(source).body for t in getattr(line, "targets", [])}
    values = {name: str(v) if types.get(name) is str and type(v) is int else v for name, v in values.items()}
    parameters = check_parameters(notebook, values)
    namespace.update(parameters)
    warnings.filterwarnings("ignore", "IProgress not found")  # progress is plain text here, widgets are not wanted
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(os.environ.get("LOGIT_BIAS_RUN") or ROOT / "runs" / "by-hand" / f"{notebook}-{digest}")
    folder.mkdir(parents=True, exist_ok=True)
    if "LOGIT_BIAS_RUN" not in os.environ:  # otherwise who named the folder holds it
        _claim(folder)
    for stale in (folder / "metrics.json", *(folder / "figures").glob(f"{notebook[:2]}_*")):
        stale.unlink(missing_ok=True)
    lines = (f"{name} = {value!r}" for name, value in parameters.items())
    print(f"{notebook} -> {os.path.relpath(folder, ROOT)}", *lines, sep="\n  ")
    return Run(notebook, parameters, folder)


def _claim(folder: Path) -> None:
    """Hold the folder of a run by hand until its record is written or its kernel ends."""
    lock = _claims.setdefault(folder, FileLock(folder / ".lock"))
    try:
        if not lock.is_locked:  # a first cell that is run again keeps its folder
            lock.acquire(blocking=False)
    except Timeout:
        del _claims[folder]
        name = os.path.relpath(folder, ROOT)
        raise ValueError(f"{name} is in use by another run; end it, or name another folder by LOGIT_BIAS_RUN") from None


def execute(notebook: str, parameters: Mapping[str, object], folder: Path, attempts: int = 3) -> dict:
    """Record of a notebook executed headless into a folder; only a kernel that fails to start is started again.

    An unknown, mistyped or impossible parameter is refused before anything is touched. What a user can put right, a
    ValueError or OSError inside the notebook, is raised as ValueError, anything else as RunFailed.
    """
    checked = check_parameters(notebook, parameters)
    here = {"LOGIT_BIAS_CWD": str(Path.cwd())}  # the kernel runs in ROOT; relative paths are the caller's
    here |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # its bars are widgets in a kernel, and stall without a browser
    if driver := os.environ.get("LOGIT_BIAS_DRIVER"):
        threading.Thread(target=_end_with, args=[int(driver)], daemon=True).start()
    with locked(folder, "--folder"), patch.dict(os.environ, here | {"LOGIT_BIAS_RUN": str(folder.resolve())}):
        unfinished, why = folder / "unfinished.ipynb", folder / "error.txt"
        for stale in (folder / "metrics.json", folder / f"{notebook}.ipynb", unfinished, why):
            stale.unlink(missing_ok=True)
        try:
            _papermill(notebook, checked, unfinished, attempts)
            if not (folder / "metrics.json").exists():
                raise RunFailed(f"{notebook} ended without a record; see {unfinished}")
        except Exception as error:
            why.write_text(f"{error}\n", encoding="utf-8")
            raise
        (folder / "figures").mkdir(exist_ok=True)
        unfinished.rename(folder / f"{notebook}.ipynb")
        return read_json(folder / "metrics.json")


def _papermill(notebook: str, parameters: Mapping[str, object], output: Path, attempts: int) -> None:
    """Execute a notebook into `output`; see `execute` for the errors."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    source, target = (re.sub("[{}]", r"\g<0>\g<0>", str(path)) for path in (notebook_path(notebook), output))
    options = {"kernel_name": "python3", "cwd": str(ROOT), "progress_bar": sys.stderr.isatty()}
    options |= {"execution_timeout": TIMEOUT_S, "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"]}
    for attempt in range(1, attempts + 1):
        try:
            papermill.execute_notebook(source, target, dict(parameters), **options)  # paths are templates to it
            return
        except PapermillExecutionError as error:
            if issubclass(getattr(builtins, error.ename, Exception), (ValueError, OSError)):
                raise ValueError(error.evalue) from None
            raise RunFailed(f"{notebook}: {error.ename}: {one_line(error.evalue)}; see {output}") from None
        except (RuntimeError, TimeoutError) as error:  # nbclient: a dead kernel, or a cell that took too long
            if "Kernel died before replying" not in str(error) or attempt == attempts:
                raise RunFailed(f"{notebook}: {one_line(error)}; see {output}") from None


def _end_with(driver: int) -> None:
    """End this process soon after another one, the snakemake that started it; SIGKILL leaves children behind."""
    while True:
        try:
            os.kill(driver, 0)
        except OSError:
            os.kill(os.getpid(), signal.SIGTERM)  # the kernel ends when its parent is gone
        time.sleep(1)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_records(folder: Path) -> list[dict]:
    """Records of all finished runs below a folder, in the order of their paths."""
    return [read_json(path) for path in sorted(folder.rglob("metrics.json"))]


def published_backbone(encoder: str) -> str:
    """Name under which tables publish one of OpenAI's image towers, `RN50` or `ViT-B/16`; else ``.

    An encoder's name counts (`open_clip:ViT-B-16-quickgelu/openai`) and so does a bank's file name (`clip_vit_b16`).
    """
    tower = r"(?:RN|ViT[_-]?([BL])[_-]?)(\d+)"
    for names in (f"open_clip:{tower}(?:-quickgelu)?/openai", f"(?i:clip[_-]{tower})"):
        if parts := re.fullmatch(names, encoder):
            return f"ViT-{parts[1].upper()}/{parts[2]}" if parts[1] else f"RN{parts[2]}"
    return ""


def join_published(ours: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Our accuracies beside the published ones of the same method, data set, backbone and number of shots.

    `ours` has a row per result: `method` (as titled in `METHODS`), `dataset`, `backbone`, `shots` and `mean` (in %).
    In `published`, data/published.csv, zero-shot CLIP stands at 0 shots and is compared at any. The rows that agree
    come back with `value`, `source`, `table` and `difference` (ours - published, in points).
    """
    theirs = published[published["metric"] == "accuracy"].replace({"method": {"LP-CLIP": "Linear probe"}})
    theirs = theirs.astype({"shots": int})[["source", "table", "method", "dataset", "clip_backbone", "shots", "value"]]
    theirs = theirs.rename(columns={"clip_backbone": "backbone"})
    keys = ["method", "dataset", "backbone", "shots"]
    compared = ours.assign(shots_run=ours["shots"], shots=ours["shots"].where(ours["method"] != "Zero-shot CLIP", 0))
    joined = compared.merge(theirs, on=keys).assign(difference=lambda rows: rows["mean"] - rows["value"])
    return joined.assign(shots=joined["shots_run"]).drop(columns="shots_run")


def check_zero_shot(dataset: str, encoder: str, measured: Mapping[str, float]) -> pd.DataFrame:
    """Zero-shot accuracies of ours, in % by metric, beside open_clip's for the same weights and data set.

    Columns metric, ours, published, difference (points), far (whether by more than FAR) and note; no row where
    data/published.csv has none. A wrong prompt, activation or label order shows here before any few-shot number.
    """
    import pandas as pd

    table = pd.read_csv(ROOT / "data" / "published.csv")
    rows = table[(table["clip_backbone"] == encoder) & (table["dataset"] == dataset.partition("@")[0])]
    rows = rows.assign(ours=rows["metric"].map(measured).astype(float)).rename(columns={"value": "published"})
    rows = rows.assign(difference=rows["ours"] - rows["published"])
    rows = rows.assign(far=rows["difference"].abs() > FAR)
    return rows[["metric", "ours", "published", "difference", "far", "note"]]
