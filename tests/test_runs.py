import json
import math

import nbformat
import pytest

from lib import methods, runs
from lib import __main__ as cli


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


def test_records_refuse_nan_and_are_written_whole(tmp_path):
    path = tmp_path / "metrics.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        runs.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_the_command_line_names_what_is_wrong(notebook, capsys, tmp_path):
    name = notebook()
    assert cli.main(["run", name, "-p", "shots", "many", "--folder", str(tmp_path)]) == 2
    assert "shots must be int, not str 'many'" in capsys.readouterr().err
    assert cli.main(["run", name, "-p", "shotz", "2", "--folder", str(tmp_path)]) == 2
    assert "did you mean 'shots'" in capsys.readouterr().err
    assert cli.main(["summary", str(tmp_path)]) == 2


def test_compare_judges_every_contestant_on_every_task(make_task):
    contestants = {"Zero-shot": ("zero_shot", {}), "AMU": ("amu", {"epochs": 3, "lam": 0.5})}
    results = methods.compare([make_task(shots=k, seed=s) for k in (1, 2) for s in (0, 1)], contestants)
    assert len(results) == 8 and set(results["label"]) == set(contestants)
    amu = results[results["label"] == "AMU"]
    assert (amu["accuracy"] >= 0).all() and all("beta" in chosen for chosen in amu["chosen"])
    table = runs.interval_table(results)
    assert list(table["shots"]) == [1, 1, 2, 2] and table["half"].notna().all()
