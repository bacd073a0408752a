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
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from lib.tasks import FewShotTask

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
VERSIONED = ("torch", "open_clip_torch", "timm", "numpy", "scikit-learn", "papermill")
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
SMALL = 2**21  # zero-shot logits of a support, C^2 K of them; larger tasks fill memory and cores by themselves
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


def write_json(path: Path, value: object) -> Path:
    """Write JSON so that the file is either the old one or the whole new one; NaN is refused."""
    text = json.dumps(value, indent=1, allow_nan=False)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(partial, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def commit() -> str:
    """Return the commit of the workbook, with `+` when files differ from it; empty outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def compare(
    tasks: Iterable[FewShotTask],
    contestants: Mapping[str, tuple[str, Mapping[str, object]]],
    protocol: str = "val",
) -> pd.DataFrame:
    """Fit every contestant on every task and judge it on the task's test images, small tasks side by side on threads.

    Args:
        contestants: label -> (name of a method, hyper-parameters to hold).
        protocol: how the remaining hyper-parameters are chosen, see `methods`.

    Returns:
        One row per task and contestant: `label`, `task`, `shots`, `seed`, `protocol`, `accuracy` in [0, 1],
        `chosen` (a dict), `seconds` (of the fit, beside whatever ran then), `right` (which test images) and `method`
        (the fitted method).
    """
    import pandas as pd

    from lib import methods, metrics, training

    def fit(pair: tuple[FewShotTask, str]) -> dict[str, object]:
        task, label = pair
        name, held = contestants[label]
        begin = time.perf_counter()
        method = methods.build(name, protocol, **held).fit(task)
        seconds = time.perf_counter() - begin
        right = metrics.right(method.logits(task.test), task.test.y)
        row = {"label": label, "task": task.name, "shots": task.shots, "seed": task.seed, "protocol": protocol}
        row |= {"accuracy": right.float().mean().item(), "chosen": method.chosen_, "seconds": seconds}
        return row | {"right": right, "method": method}

    pairs = list(product(tasks, contestants))
    if any(task.support.zero_shot.numel() > SMALL for task, _ in pairs):  # one at a time needs half of the memory
        return pd.DataFrame(map(fit, pairs))
    return pd.DataFrame(training.in_threads(fit, pairs))


def interval_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return mean accuracy and half-width of its 95 % interval over seeds, in %, per label and number of shots."""
    import pandas as pd

    from lib.metrics import mean_interval

    rows = [
        {"label": label, "shots": shots, "mean": 100 * mean, "half": 100 * half}
        for (label, shots), group in results.groupby(["label", "shots"], sort=False)
        for mean, half in [mean_interval(group["accuracy"])]
    ]
    return pd.DataFrame(rows)
