"""Sweeps: what a YAML file says is run, whatever dies on the way, and ends in one table."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from small_models import write_folder

from lib import records, sweeps

SMALL = """
a: int = 1  # first
b: int = 1  # second
dataset: str = "shapes"  # name
shots: int = 4  # images
seeds: int = 1  # draws
"""
FAULTS = """
import os, pathlib, signal
mark = pathlib.Path(os.environ.get("FAULTS", "none")) / f"{a}-{b}"  # a file there injects the fault it names, once
fault = mark.read_text() if mark.exists() else ""
if fault:
    mark.unlink()
if fault == "raise":
    raise RuntimeError(f"injected into {a}, {b}")
if fault == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if fault == "full":
    with open("/dev/full", "wb") as disk:
        disk.write(b"x")
"""
RECORD = """
rows = [{"dataset": dataset, "clip": "c", "aux": "x", "method": "M", "label": f"{a}", "shots": shots, "seed": b,
         "protocol": "val", "accuracy": a + b / 100, "chosen": {}, "seconds": 0.1}]
run.record({"sum": a + b}, {"clip": "f"}, rows=rows)
"""


@pytest.fixture
def workbook(tmp_path):
    """Return a copy of the workbook whose two notebooks take a moment."""
    place = tmp_path / "work book+{it's}"
    for name in ("lib", "profiles"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "data/published.csv", "data/benchmarks.json", "data/embedded/index.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    for name in ("world", "draw", "render"):
        shutil.copy(ROOT / f"data/embedded/{name}.py", place / "data/embedded")
    shutil.copytree(ROOT / "notebooks/book/report", place / "notebooks/book/report")
    for name in ("00_first", "01_tiny"):
        book = nbformat.v4.new_notebook(
            metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
        )
        start = f"from lib import runs\nrun = runs.start({name!r}, globals())"
        book.cells = [nbformat.v4.new_code_cell(SMALL.strip(), metadata={"tags": ["parameters"]})]
        book.cells += [nbformat.v4.new_code_cell(text.strip()) for text in (start, FAULTS, RECORD)]
        nbformat.write(book, place / "notebooks" / f"{name}.ipynb")
    return place


def sweep(place: Path, text: str) -> str:
    (place / "sweep.yaml").write_text(text)
    return "sweep.yaml"


def start(place: Path, *words: str, profile: str = "local", **more: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(place), "LOGIT_BIAS_CACHE": str(place / "cache")} | more
    environment.pop("LOGIT_BIAS_RUN", None)
    command = [sys.executable, "-m", "snakemake", "--profile", f"profiles/{profile}", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=place, env=environment, **pipes)


def snakemake(place: Path, *words: str, **more: str) -> tuple[int, str]:
    process = start(place, *words, **more)
    output, _ = process.communicate(timeout=2400)
    return process.returncode, output


def alive(place: Path) -> list[str]:
    """Return the command lines of processes that work in a folder, kernels among them."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            here = os.readlink(process / "cwd") == str(place)
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if here and ("lib run" in command or "ipykernel" in command):
            lines.append(command)
    return lines


GRID = """
out: runs/grid
blocks:
  - notebook: 01_tiny
    fixed: {{dataset: "folder:it's a {{b}}"}}
    grid: {{a: [{a}], b: [{b}]}}
"""


def test_a_sweep_is_checked_before_anything_runs(tmp_path, monkeypatch):
    one = {"notebook": "05_tune_amu", "seeds": 2, "fixed": {"epochs": 3}, "grid": {"dataset": ["shapes", "digits"]}}
    one["grid"]["shots"] = [1, 4]
    [block] = sweeps.blocks({"blocks": [one]})
    assert block.notebook == "05_tune_amu" and len(block.parameters) == 4
    assert block.parameters[1] == {"epochs": 3, "seeds": 2, "dataset": "shapes", "shots": 4}
    assert block.labels[2] == {"dataset": "digits", "shots": "1"}
    for change, message in [
        ({"notebook": "05_tune"}, "no notebook '05_tune'; did you mean '05_tune_amu'"),
        ({"grids": {}}, "block 1 has no 'grids'; did you mean 'grid'"),
        ({"fixed": {"epoch": 3}}, "no parameter 'epoch'; did you mean 'epochs'"),
        ({"fixed": {"shots": 3}}, "block 1: shots is given twice"),
        ({"fixed": {"seeds": 3}}, "block 1: seeds is given twice"),
        ({"seeds": 0}, "seeds must be at least 1, not 0"),
        ({"grid": {}}, "block 1 has no grid, so no runs"),
        ({"grid": {"shots": 4}}, "the grid of shots must be a list of values, not 4"),
        ({"grid": {"shots": [4, 4]}}, "the grid of shots has a value twice"),
        ({"grid": {"shots": ["4"]}}, "shots must be int, not str '4'"),
        ({"grid": {"protocol": ["best"]}}, "protocol must be one of val, fixed, oracle, not 'best'"),
    ]:
        with pytest.raises(ValueError, match=message):
            sweeps.blocks({"blocks": [one | change]})
    for config, message in [
        ({"blocks": []}, "must be a list with an entry"),
        ({"blocks": [one], "seed": 1}, "a sweep has no 'seed'"),
        ({"blocks": [{"seeds": 1}]}, "block 1 names no notebook"),
        ({"blocks": ["x"]}, "block 1 must be keys and values, not 'x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            sweeps.blocks(config)


def test_a_label_is_a_folder_name_and_different_for_different_values():
    values = ["folder:my photos/x", "folder:my photos_x", "{a}", "a*", 1.5, "é" * 80, "é" * 79, ""]
    labels = [sweeps.label(value) for value in values]
    assert len(set(labels)) == len(values)
    assert all(not set(text) & set("/{}* '\"") and len(text) <= 120 for text in labels)
    assert sweeps.label("embedded:other-classes") == "embedded:other-classes"


def test_extractions_are_jobs():
    jobs = sweeps.extractions({"extract": [{"dataset": "dtd@16/1", "encoders": ["a", "b"], "jobs": 2}]})
    assert list(jobs.values()) == [["extract", "dtd@16/1", "a", "b"]] * 2 and len(jobs) == 2
    with pytest.raises(ValueError, match="extraction 1: encoders must be list, not 'a'"):
        sweeps.extractions({"extract": [{"dataset": "x", "encoders": "a"}]})


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_sweeps_that_ship_are_sound(path):
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "--quiet", "rules", "--configfile", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "to run, never timed" in done.stderr or "finished, took" in done.stderr


def inject(place: Path, faults: dict[str, str]) -> dict[str, str]:
    """Write faults by run and return the environment that brings them about."""
    (place / "faults").mkdir(exist_ok=True)
    for run, fault in faults.items():
        (place / "faults" / run).write_text(fault)
    return {"FAULTS": str(place / "faults")}


def test_a_sweep_goes_on_past_failures_and_ends_as_if_nothing_had_happened(workbook):
    file, grid = sweep(workbook, GRID.format(a="1, 2", b="1, 2, 3")), workbook / "runs/grid/01_tiny"
    faults = inject(workbook, {"1-1": "raise", "1-3": "kill", "2-2": "full"})
    code, output = snakemake(workbook, "--configfile", file, **faults)
    assert code != 0 and "3 runs did not finish" in output, output
    lines = [line for line in output.splitlines() if line.startswith("  runs/grid/01_tiny")]
    assert "a=1/b=1: 01_tiny: RuntimeError: injected into 1, 1; see" in lines[0]
    assert "a=1/b=3: 01_tiny: Kernel died" in lines[1]
    assert lines[2].endswith("a=2/b=2: [Errno 28] No space left on device")
    assert "injected into" in (grid / "a=1/b=1/unfinished.ipynb").read_text(), "the notebook is kept as the log"
    assert not (grid / "a=1/b=1/metrics.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in grid.rglob("metrics.json")}
    assert len(finished) == 3
    code, output = snakemake(workbook, "--configfile", file, "--dry-run", **faults)
    assert code == 0 and "3 of 6 to run" in output
    assert "b=1: to run, others of 01_tiny took" in output and "b=2: finished, took" in output, output
    code, output = snakemake(workbook, "--configfile", file, **faults)
    assert code == 0, output
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "only what was missing"
    assert not list(grid.rglob("unfinished.ipynb")) + list(grid.rglob("error.txt"))
    gathered = records.table([workbook / "runs/grid"])
    assert list(gathered["accuracy"]) == [1.01, 1.02, 1.03, 2.01, 2.02, 2.03]
    assert set(gathered["dataset"]) == {"folder:it's a {b}"}
    shutil.rmtree(grid / "a=1/b=2/figures")
    code, output = snakemake(workbook, "--configfile", file)
    assert code == 0 and (grid / "a=1/b=2/figures").is_dir(), "a deleted folder is drawn again"


def test_a_killed_driver_takes_its_runs_along_and_the_next_one_goes_on(workbook):
    notebook = workbook / "notebooks/01_tiny.ipynb"
    notebook.write_text(
        notebook.read_text().replace("import os, pathlib", "import time; time.sleep(2 * a)\\nimport os, pathlib")
    )
    file, grid = sweep(workbook, GRID.format(a="0, 60", b="1")), workbook / "runs/grid/01_tiny"
    driver = start(workbook, "--configfile", file)
    for _ in range(600):
        if (grid / "a=0/b=1/metrics.json").exists() and (grid / "a=60/b=1/unfinished.ipynb").exists():
            break
        time.sleep(0.1)
    assert alive(workbook)
    code, output = snakemake(workbook, "--configfile", file)
    assert code != 0 and "another snakemake works on runs/grid" in output, output
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    for _ in range(100):
        if not (left := alive(workbook)):
            break
        time.sleep(0.1)
    assert left == [], "neither runs nor kernels live on"
    driver.stdout.close()
    notebook.write_text(notebook.read_text().replace("time.sleep(2 * a)", "time.sleep(0)"))
    code, output = snakemake(workbook, "--configfile", file)
    assert code == 0, output
    assert len(records.table([workbook / "runs"])) == 2


def test_the_report_holds_records_and_figures_under_their_notebook(workbook):
    code, output = snakemake(workbook)
    assert code == 0, output
    code, output = snakemake(workbook, "--report", "report.html")
    assert code == 0, output
    page = (workbook / "report.html").read_text()
    assert "01_tiny" in page and "metrics" in page


@pytest.mark.stress
def test_a_sweep_on_a_real_slurm(workbook, tmp_path):
    if not shutil.which("slurmctld") or not shutil.which("munged") or os.geteuid():
        pytest.skip("SLURM (Debian's slurm-wlm and munge, started as root) is not on this machine")
    script = ["sh", str(ROOT / "tests" / "slurm.sh")]
    if subprocess.run([*script, "start", "2"]).returncode:
        pytest.skip("SLURM does not start on this machine")
    try:
        for name in ("clip", "random"):
            shutil.copy(ROOT / f"data/embedded/{name}.safetensors", workbook / "data/embedded")
        images = write_folder(workbook / "own", classes=3, images=200, splits=("train", "test"))
        extract = f"extract:\n  - {{dataset: 'folder:{images.name}', encoders: ['embedded:random'], jobs: 2}}\n"
        file = sweep(workbook, GRID.format(a="1, 2", b="1, 2") + extract)
        faults = inject(workbook, {"1-1": "raise", "2-2": "kill"})
        words = ("--configfile", file, "--slurm-status-command", "squeue", "--latency-wait", "5")
        words += ("--default-resources", "cpus_per_task=1")
        code, output = snakemake(workbook, *words, "--retries", "0", profile="slurm", **faults)
        assert code != 0 and "2 runs did not finish" in output, output
        assert "RuntimeError: injected into 1, 1" in output and "Kernel died" in output
        code, output = snakemake(workbook, *words, profile="slurm", **faults)
        assert code == 0, output
        assert len(records.table([workbook / "runs/grid"])) == 4
        assert len(list((workbook / "runs/grid/extracted").iterdir())) == 2
        assert len(list((workbook / "cache").rglob("manifest.json"))) == 3, "train, val and test, each once"
        assert not list((workbook / "cache").rglob("shard-*"))
    finally:
        subprocess.run([*script, "stop"], check=True)


@pytest.mark.stress
def test_two_hundred_runs_with_failures_end_in_the_table_of_an_undisturbed_sweep(workbook, tmp_path):
    grid = GRID.format(a=", ".join(map(str, range(20))), b=", ".join(map(str, range(10))))
    begin = time.monotonic()
    code, output = snakemake(workbook, "--configfile", sweep(workbook, grid.replace("runs/grid", "runs/calm")))
    assert code == 0, output[-3000:]
    calm = time.monotonic() - begin
    runs = [f"{a}-{b}" for a in range(20) for b in range(10)]
    chosen = random.Random(1).sample(runs, 45)
    kinds = dict(zip(chosen, ["raise", "kill", "full"] * 15, strict=True))
    faults, file, kills = inject(workbook, kinds), sweep(workbook, grid), 0
    for killed_at in (30, 80, 130):  # the driver dies when so many runs have finished
        driver = start(workbook, "--configfile", file, **faults)
        while len(list((workbook / "runs/grid").rglob("metrics.json"))) < killed_at and driver.poll() is None:
            time.sleep(0.2)
        if driver.poll() is None:
            os.kill(driver.pid, signal.SIGKILL)
            kills += 1
        driver.communicate()
    for _ in range(4):
        code, output = snakemake(workbook, "--configfile", file, **faults)
        if code == 0:
            break
    assert code == 0, output[-3000:]
    assert kills == 3 and not list((workbook / "faults").iterdir()), "every fault came about"
    undisturbed, disturbed = (records.table([workbook / "runs" / name]) for name in ("calm", "grid"))
    assert len(undisturbed) == 200
    pd.testing.assert_frame_equal(disturbed, undisturbed)
    print(f"200 runs in {calm:.0f} s undisturbed; 45 faults and 3 kills of the driver: no row lost")


@pytest.mark.stress
def test_the_sweep_of_the_readme_runs_as_printed(tmp_path):
    text = (ROOT / "README.md").read_text().split("## Sweeps")[1].split("\n## ")[0]
    commands = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("    .venv/bin/")]
    assert len(commands) == 4
    for command in commands:
        subprocess.run(command, shell=True, cwd=ROOT, check=True)
    table = pd.read_parquet(ROOT / "runs/methods/results.parquet")
    assert len(table.drop_duplicates(records.KEYS)) >= 36 * 3, "six methods, two data sets, three shots, three seeds"
    assert (ROOT / "runs/swept/metrics.json").exists()


@pytest.mark.stress
def test_sixteen_runs_that_start_at_once_all_finish(workbook):
    file = sweep(workbook, GRID.format(a="1, 2, 3, 4", b="1, 2, 3, 4"))
    code, output = snakemake(workbook, "--configfile", file, "--cores", "16")
    assert code == 0, output
    assert len(records.table([workbook / "runs/grid"])) == 16
