"""Runs: parameters checked, records written last, figures in their own folders, a gallery from one clean commit."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import collect
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from lib import __main__ as cli
from lib import files, runs


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Return a function that writes a notebook of the given cells where `runs` looks for notebooks."""
    monkeypatch.setattr(runs, "NOTEBOOKS", tmp_path)

    def write(*cells, name="98_try", parameters="shots: int = 4  # images\nrate: float = 0.5  # 1\nname: str = 'a'"):
        book = nbformat.v4.new_notebook(
            metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
        )
        book.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        book.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
        nbformat.write(book, tmp_path / f"{name}.ipynb")
        return name

    return write


START = "from lib import runs\nfrom pathlib import Path\nrun = runs.Run('98_try', {'shots': shots}, Path(%r))"


def test_parameters_are_checked(notebook):
    name = notebook()
    assert runs.check_parameters(name, {"shots": 2, "rate": 1}) == {"shots": 2, "rate": 1.0, "name": "a"}
    for given, message in [
        ({"shot": 2}, "has no parameter 'shot'; did you mean 'shots'"),
        ({"shots": "2"}, "shots must be int, not str '2'"),
        ({"shots": True}, "shots must be int, not bool True"),
        ({"name": 3}, "name must be str, not int 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            runs.check_parameters(name, given)
    with pytest.raises(ValueError, match="no notebook '55_none'; known: 98_try"):
        runs.check_parameters("55_none", {})


def test_impossible_values_are_refused_before_any_work(notebook, tmp_path):
    name = notebook(
        parameters="seeds: int = 3  # n\nepochs: int = 5  # n\nval_shots: int = 4  # n\nprotocol: str = 'val'"
    )
    (tmp_path / "metrics.json").write_text("{}")
    for given, message in [
        ({"seeds": 0}, "seeds must be at least 1, not 0"),
        ({"epochs": -1}, "epochs must be at least 1, not -1"),
        ({"val_shots": -3}, "val_shots must be at least 0, not -3"),
        ({"protocol": "best"}, "protocol must be one of val, fixed, oracle, not 'best'"),
    ]:
        with pytest.raises(ValueError, match=message):
            runs.execute(name, given, tmp_path)
    assert (tmp_path / "metrics.json").exists()
    assert runs.check_parameters(name, {"seeds": 1, "val_shots": 0})["seeds"] == 1


def test_a_users_error_is_one_line_and_the_notebook_tells_more(notebook, tmp_path, capfd):
    name = notebook("from lib import files\nraise ValueError('support has 3 classes, text has 4')")
    assert cli.main(["run", name, "--folder", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err == "error: support has 3 classes, text has 4\n"
    assert "ValueError" in (tmp_path / "out" / "unfinished.ipynb").read_text()
    assert (tmp_path / "out" / "error.txt").read_text() == "support has 3 classes, text has 4\n"
    name = notebook("1 / 0")
    assert cli.main(["run", name, "--folder", str(tmp_path / "out")]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: 98_try: ZeroDivisionError: division by zero; see ") and printed.count("\n") == 1


def test_two_runs_of_one_folder_take_turns(notebook, tmp_path):
    lines = f"with open({str(tmp_path / 'log')!r}, 'a') as log:\n    log.write(f'{{name}}\\n')"
    name = notebook(
        START % str(tmp_path / "out"), lines, "import time\ntime.sleep(1)", lines, "run.record({'name': name})"
    )
    command = [
        sys.executable,
        "-c",
        "import sys; from pathlib import Path; from lib import __main__, runs\n"
        f"runs.NOTEBOOKS = Path({str(tmp_path)!r}); __main__.main(sys.argv[1:])",
    ]
    folder = ["--folder", str(tmp_path / "out")]
    both = [subprocess.Popen([*command, "run", name, "-p", "name", word, *folder], cwd=runs.ROOT) for word in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    order = (tmp_path / "log").read_text().split()
    assert order in (["a", "a", "b", "b"], ["b", "b", "a", "a"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]["name"] == order[-1]
    assert f'name = \\"{order[-1]}\\"' in (tmp_path / "out" / f"{name}.ipynb").read_text(), "of one run"


def test_a_run_by_hand_has_its_folder_until_its_record_is_written(notebook, tmp_path, monkeypatch):
    name = notebook()
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.delenv("LOGIT_BIAS_RUN", raising=False)
    run = runs.start(name, {})
    assert runs.start(name, {}).folder == run.folder, "a first cell that is run again keeps its folder"
    other = "import sys; from pathlib import Path; from lib import runs\n"
    other += f"runs.NOTEBOOKS, runs.ROOT = Path({str(tmp_path)!r}), Path({str(tmp_path)!r}); runs.start({name!r}, {{}})"
    command = [sys.executable, "-c", other]
    here = str(ROOT)
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.returncode != 0 and "is in use by another run; end it, or name another folder" in done.stderr
    run.record({})
    assert subprocess.run(command, cwd=here, capture_output=True).returncode == 0


def test_a_notebook_without_a_parameters_cell_is_refused(notebook, tmp_path):
    book = nbformat.v4.new_notebook()
    nbformat.write(book, tmp_path / "97_bare.ipynb")
    with pytest.raises(ValueError, match="needs one cell tagged 'parameters', has 0"):
        runs.check_parameters("97_bare", {})


def test_papermill_by_hand_cannot_smuggle_an_unknown_parameter(notebook, tmp_path, monkeypatch):
    name = notebook()
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    space = {"shots": 3, "rate": 0.5, "name": "a", "shotz": 2, "In": ["", "# Parameters\nshots = 3\nshotz = 2\n"]}
    with pytest.raises(ValueError, match="no parameter 'shotz'; did you mean 'shots'"):
        runs.start(name, space)
    run = runs.start(name, {**space, "In": ["", "# Parameters\nshots = 3\n"]})
    assert run.parameters["shots"] == 3 and run.folder.is_dir()


def test_execute_returns_the_record(notebook, tmp_path):
    name = notebook(START % str(tmp_path / "out"), "run.record({'shots': shots})")
    record = runs.execute(name, {"shots": 2}, tmp_path / "out")
    assert record["metrics"] == {"shots": 2} and record["versions"]["torch"] and record["seconds"] >= 0
    assert runs.read_records(tmp_path)[0] == record


@pytest.mark.parametrize(
    ("cell", "error"),
    [("import sys\nsys.exit(0)", RuntimeError), ("1 / 0", Exception), ("import os\nos._exit(1)", Exception)],
)
def test_a_run_that_did_not_finish_leaves_no_record(notebook, tmp_path, cell, error):
    name = notebook(START % str(tmp_path / "out"), cell, "run.record({})")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")
    with pytest.raises(error):
        runs.execute(name, {}, tmp_path / "out", attempts=1)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_mistyped_parameter_leaves_the_earlier_run_alone(notebook, tmp_path):
    name = notebook()
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="shots must be int"):
        runs.execute(name, {"shots": "many"}, tmp_path)
    assert (tmp_path / "metrics.json").exists()


def test_a_number_that_does_not_exist_is_null_and_infinity_is_refused(tmp_path):
    run = runs.Run("98_try", {}, tmp_path)
    assert run.record({"a": math.nan, "b": {"c": [1, (math.nan, 2.0)]}}, {"clip": "f"}, draws=1) is None
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["metrics"] == {"a": None, "b": {"c": [1, [None, 2.0]]}}
    assert record["fingerprints"] == {"clip": "f"} and record["draws"] == 1
    with pytest.raises(ValueError, match="Out of range float"):
        run.record({"a": math.inf})
    assert json.loads((tmp_path / "metrics.json").read_text()) == record
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_papermill_makes_an_int_of_a_text_and_start_makes_it_text_again(notebook, tmp_path, monkeypatch):
    name = notebook()
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    space = {"shots": 3, "rate": 1, "name": 7}
    run = runs.start(name, space)
    assert run.parameters == {"shots": 3, "rate": 1.0, "name": "7"} and space["name"] == "7"
    for wrong in (True, 7.5):
        with pytest.raises(ValueError, match="name must be str"):
            runs.start(name, {"name": wrong})
    with pytest.raises(ValueError, match="name must be str, not int 7"):
        runs.execute(name, {"name": 7}, tmp_path / "out")


def test_relative_paths_are_those_of_the_caller(notebook, tmp_path, monkeypatch):
    name = notebook(
        "import sys\nfrom lib import runs\nfrom lib.files import find_path\nfrom pathlib import Path\n"
        "run = runs.Run('98_try', {}, Path(__import__('os').environ['LOGIT_BIAS_RUN']))",
        "run.record({'path': str(find_path('banks/ten').resolve()), 'root': str(find_path('data').resolve())})",
    )
    (tmp_path / "here" / "banks" / "ten").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["run", name, "--folder", "out"]) == 0
    record = json.loads((tmp_path / "here" / "out" / "metrics.json").read_text())
    assert record["metrics"]["path"] == str((tmp_path / "here" / "banks" / "ten").resolve())
    assert record["metrics"]["root"] == str(runs.ROOT / "data"), "what is not there is looked for in the workbook"


def test_figures_stay_in_the_folder_of_their_run(tmp_path):
    run = runs.Run("98_try", {}, tmp_path)
    fig, _ = plt.subplots(figsize=(1, 1))
    run.save_figure(fig, "plane")
    run.save_figure(fig, "seconds", gallery=False)
    plt.close(fig)
    drawn = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert drawn == ["figures/98_plane.png", "figures/98_plane.svg", "own/98_seconds.png", "own/98_seconds.svg"]


def test_a_new_start_clears_the_figures_of_an_earlier_one(notebook, tmp_path, monkeypatch):
    name = notebook()
    monkeypatch.setenv("LOGIT_BIAS_RUN", str(tmp_path / "out"))
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "out" / "figures").mkdir(parents=True)
    for stale in ("figures/98_old.png", "metrics.json", "figures/97_other.png"):
        (tmp_path / "out" / stale).touch()
    runs.start(name, {})
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["97_other.png"]


def git(folder, *command):
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *author, *command], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def workbook(notebook, tmp_path, monkeypatch):
    """Return a small committed workbook: one notebook that has run, a gallery with a stale figure."""
    name = notebook()
    for module in (files, runs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "97_stale.png").write_text("stale")
    (tmp_path / "figures" / "speed.svg").write_text("an earlier benchmark's")
    speed = {"notebook": "bench", "parameters": {"quick": False}, "commit": "earlier", "fingerprints": {}}
    (tmp_path / "figures" / "index.json").write_text(json.dumps({"speed": speed, "97_stale": {"notebook": "97"}}))
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        git(tmp_path, *command)
    return name


def finish(root, name, given=(), figure="98_plane", **facts):
    """Leave a finished run of a notebook, with one figure."""
    folder = root / "runs" / name
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        (folder / "figures" / f"{figure}.{kind}").write_text(f"drawn as {kind}")
    parameters = {"shots": 4, "rate": 0.5, "name": "a"} if name != "bench" else {"quick": False}
    record = {"notebook": name, "parameters": parameters | dict(given), "commit": runs.commit(), "fingerprints": {}}
    (folder / "metrics.json").write_text(json.dumps(record | facts))


def test_the_gallery_is_what_the_runs_drew(workbook, tmp_path):
    finish(tmp_path, workbook)
    gallery = tmp_path / "figures"
    assert collect.collect(tmp_path / "runs", gallery) == ["98_plane", "speed"]
    names = sorted(path.name for path in gallery.iterdir())
    assert names == ["98_plane.png", "98_plane.svg", "index.json", "speed.svg"], "the stale figure is gone"
    index = json.loads((gallery / "index.json").read_text())
    assert index["98_plane"] == {
        **{"notebook": workbook, "parameters": {"shots": 4, "rate": 0.5, "name": "a"}},
        **{"commit": git(tmp_path, "rev-parse", "HEAD").strip(), "fingerprints": {}},
    }
    assert index["speed"]["commit"] == "earlier", "no benchmark has run here"
    finish(tmp_path, "bench", figure="speed", commit="any commit")
    collect.collect(tmp_path / "runs", gallery)
    assert (gallery / "speed.svg").read_text() == "drawn as svg"
    assert json.loads((gallery / "index.json").read_text())["speed"]["commit"] == "any commit"
    assert not runs.commit().endswith("+"), "the gallery itself is no change of the code"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"given": {"shots": 2}}, "98_try ran with shots=2"),
        ({"commit": "0123"}, "98_try ran at 0123, not "),
        ({"commit": ""}, "98_try ran at no commit"),
        (None, "98_try has not finished"),
    ],
)
def test_the_gallery_refuses_other_runs_and_stays_as_it_is(workbook, tmp_path, facts, message):
    if facts is not None:
        finish(tmp_path, workbook, **facts)
    with pytest.raises(ValueError, match=message):
        collect.collect(tmp_path / "runs", tmp_path / "figures")
    assert git(tmp_path, "status", "--porcelain") == ""


def test_the_gallery_refuses_changed_files_and_quick_benchmarks(workbook, tmp_path):
    finish(tmp_path, workbook)
    finish(tmp_path, "bench", {"quick": True}, figure="speed")
    with pytest.raises(ValueError, match="bench ran with quick=True"):
        collect.collect(tmp_path / "runs", tmp_path / "figures")
    finish(tmp_path, "bench", figure="speed", commit="0123+")
    with pytest.raises(ValueError, match=r"bench ran at 0123\+"):
        collect.collect(tmp_path / "runs", tmp_path / "figures")
    (tmp_path / "new.py").touch()
    with pytest.raises(ValueError, match="files differ from the commit"):
        collect.collect(tmp_path / "runs", tmp_path / "figures")


def test_a_record_names_the_commit_that_its_run_started_at(workbook, tmp_path):
    run = runs.Run(workbook, {}, tmp_path / "runs" / "x")
    (tmp_path / "runs" / "x").mkdir(parents=True)
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "figures" / "98_new.png").touch()
    (tmp_path / "runs" / "x" / "output").touch()
    assert runs.commit() == head, "neither a run's output nor the gallery is a change"
    (tmp_path / "changed.py").touch()
    run.record({})
    assert runs.read_records(tmp_path / "runs")[0]["commit"] == head
    assert runs.commit() == head + "+"


def test_the_command_line_names_what_is_wrong(notebook, capsys, tmp_path):
    name = notebook()
    assert cli.main(["run", name, "-p", "shots", "many", "--folder", str(tmp_path)]) == 2
    assert "shots must be int, not str 'many'" in capsys.readouterr().err
    assert cli.main(["run", name, "-p", "shotz", "2", "--folder", str(tmp_path)]) == 2
    assert "did you mean 'shots'" in capsys.readouterr().err
    assert cli.main(["summary", str(tmp_path)]) == 2


def test_the_summary_is_a_table_of_the_last_run(tmp_path, capsys):
    rows = {"AMU-Tuning": {"16": {"mean": 61.24, "half": 0.52}, "1": {"mean": 50.0, "half": None}}}
    run = runs.Run("05_tune_amu", {"dataset": "digits", "seeds": 3, "protocol": "val"}, tmp_path / "05_tune_amu")
    run.folder.mkdir()
    run.record({"accuracy": rows})
    assert cli.main(["summary", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n +1 +16\nAMU-Tuning +50\.0 +61\.2 ± 0\.5\n", printed) and "on digits" in printed


def test_the_list_of_data_sets_says_which_can_only_be_tested_on(capsys, monkeypatch):
    from lib.features import datasets

    splits = {"here": ("train", "test"), "shifted": ("test",)}
    made = {name: SimpleNamespace(classnames=("a", "b"), splits=parts) for name, parts in splits.items()}
    monkeypatch.setattr(datasets, "names", lambda: list(made))
    monkeypatch.setattr(datasets, "load", made.__getitem__)
    assert cli.main(["datasets"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"here +here: 2 classes, train, test\n", printed)
    assert re.search(r"shifted +here: 2 classes, test only: use as test=\n", printed)


def test_published_backbones_are_openais_only():
    names = {
        "open_clip:ViT-B-16-quickgelu/openai": "ViT-B/16",
        "open_clip:RN50-quickgelu/openai": "RN50",
        "open_clip:ViT-L-14/openai": "ViT-L/14",
        "open_clip:ViT-B-16/laion2b_s34b_b88k": "",
        "embedded:clip": "",
        "clip_vit_b32": "ViT-B/32",
        "clip_RN101": "RN101",
        "clip": "",
    }
    assert {name: runs.published_backbone(name) for name in names} == names


def test_published_numbers_are_joined_only_where_everything_agrees():
    published = pd.DataFrame(
        [
            ("a paper", "Table 4", "AMU-Tuning", "RN50", "imagenet", 16, "accuracy", 70.02),
            ("a paper", "Table 4", "AMU-Tuning", "ViT-B/16", "imagenet", 16, "accuracy", 74.9),
            ("a paper", "Table 4", "LP-CLIP", "RN50", "imagenet", 1, "accuracy", 22.17),
            ("a paper", "Table 1", "Zero-shot CLIP", "RN50", "imagenet", 0, "accuracy", 60.33),
            ("a paper", "Table 2", "AMU-Tuning", "RN50", "imagenet", 16, "superiority", 57.68),
        ],
        columns=["source", "table", "method", "clip_backbone", "dataset", "shots", "metric", "value"],
    )
    ours = pd.DataFrame(
        [
            ("AMU-Tuning", "imagenet", "RN50", 16, 69.0),
            ("AMU-Tuning", "imagenet", "RN50", 8, 67.0),
            ("AMU-Tuning", "imagenetv2", "RN50", 16, 60.0),
            ("Linear probe", "imagenet", "RN50", 1, 22.0),
            ("Zero-shot CLIP", "imagenet", "RN50", 4, 60.0),
        ],
        columns=["method", "dataset", "backbone", "shots", "mean"],
    )
    joined = runs.join_published(ours, published).set_index("method")
    assert joined["difference"].round(2).to_dict() == {
        "AMU-Tuning": -1.02,
        "Linear probe": -0.17,
        "Zero-shot CLIP": -0.33,
    }
    assert joined["shots"].to_dict() == {"AMU-Tuning": 16, "Linear probe": 1, "Zero-shot CLIP": 4}
    nothing = runs.join_published(ours.assign(backbone=""), published)
    assert len(nothing) == 0 and "difference" in nothing


def test_zero_shot_accuracies_are_checked_against_open_clips():
    measured = {"accuracy": 60.5, "mean per-class accuracy": 80.0}
    checked = runs.check_zero_shot("imagenet@16/1", "open_clip:RN50-quickgelu/openai", measured)
    assert checked[["published", "far"]].values.tolist() == [[59.82, False]]
    assert checked["difference"].iloc[0] == pytest.approx(0.68)
    [pets] = runs.check_zero_shot("oxford_pets", "open_clip:RN50-quickgelu/openai", measured).to_dict("records")
    assert pets["metric"] == "mean per-class accuracy" and pets["far"] and pets["difference"] == pytest.approx(-5.29)
    for dataset, encoder in (("ucf101", "open_clip:RN50-quickgelu/openai"), ("imagenet", "embedded:clip")):
        assert runs.check_zero_shot(dataset, encoder, measured).empty
