"""Records as a table: one row per draw, the published number beside it, the later of two equal runs."""

import json
import os

import pandas as pd
import pytest

from lib import __main__ as cli
from lib import methods, records


def leave(folder, rows, test="", commit="c0"):
    """Leave a record with some rows."""
    folder.mkdir(parents=True)
    record = {"notebook": "05_tune_amu", "parameters": {"test": test}, "commit": commit, "fingerprints": {"clip": "f"}}
    (folder / "metrics.json").write_text(json.dumps(record | {"rows": rows}))


def row(**changes):
    usual = {"dataset": "imagenet@16/1", "clip": "open_clip:RN50-quickgelu/openai", "aux": "mocov3:m.pth.tar"}
    usual |= {"method": "AMU-Tuning", "label": "amu", "shots": 16, "seed": 1, "protocol": "val", "accuracy": 69.0}
    return usual | {"chosen": {"beta": 3.0}, "seconds": 1.5} | changes


def test_rows_are_those_of_compare(make_task):
    from types import SimpleNamespace

    tasks = [make_task(seed=seed) for seed in (1, 2)]
    results = methods.compare(tasks, {"zs": ("zero_shot", {}), "GDA here": ("gda", {})})
    kept = records.rows(results, SimpleNamespace(encoders=("clip_a", "aux_b")), "mine")
    assert len(kept) == 4 and json.loads(json.dumps(kept)) == kept, "JSON can hold them"
    gda = [one for one in kept if one["label"] == "GDA here"]
    assert [one["method"] for one in gda] == ["GDA", "GDA"] and set(gda[0]["chosen"]) >= {"beta"}
    assert gda[0]["accuracy"] == pytest.approx(100 * results.set_index("label").loc["GDA here", "accuracy"].iloc[0])
    assert {(one["dataset"], one["clip"], one["aux"]) for one in kept} == {("mine", "clip_a", "aux_b")}


def test_the_table_joins_published_numbers_where_all_agrees(tmp_path):
    leave(tmp_path / "a", [row(), row(seed=2, accuracy=70.0), row(shots=3), row(clip="embedded:clip")])
    leave(tmp_path / "b", [row(accuracy=50.0)], test="imagenetv2")
    table = records.table([tmp_path])
    assert list(table.columns) == list(records.COLUMNS) and len(table) == 5
    by = table.set_index(["test", "clip", "shots", "seed"])["published"]
    published = pd.read_csv(records.ROOT / "data/published.csv")
    ours = (published["dataset"] == "imagenet") & (published["clip_backbone"] == "RN50")
    ours &= (published["method"] == "AMU-Tuning") & (published["shots"] == 16) & (published["metric"] == "accuracy")
    expected = published[ours]["value"].iloc[0]
    clip = "open_clip:RN50-quickgelu/openai"
    assert by["", clip, 16, 1] == by["", clip, 16, 2] == expected
    assert by.isna().sum() == 3, "other shots, encoder or test set"
    assert json.loads(table["chosen"][0]) == {"beta": 3.0} and set(table["run"]) == {"a", "b"}


def test_of_two_equal_runs_the_later_counts(tmp_path):
    leave(tmp_path / "new", [row(accuracy=71.0)], commit="c1")
    leave(tmp_path / "old", [row(accuracy=68.0)])
    os.utime(tmp_path / "old/metrics.json", (1, 1))
    table = records.table([tmp_path])
    assert table["accuracy"].tolist() == [71.0] and table["commit"].tolist() == ["c1"]


def test_parquet_and_csv_hold_the_same(tmp_path, capsys):
    leave(tmp_path / "a", [row(), row(seed=2, clip="embedded:clip")])
    assert cli.main(["results", str(tmp_path)]) == 0
    assert "2 rows of 1 runs" in capsys.readouterr().out
    parquet, csv = (records.read(tmp_path / f"results.{kind}") for kind in ("parquet", "csv"))
    pd.testing.assert_frame_equal(parquet, csv, check_dtype=False)
    assert cli.main(["results", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["results", str(tmp_path / "empty")]) == 2
    assert "no record with rows per seed" in capsys.readouterr().err
    csv.drop(columns=["seed", "commit"]).to_csv(tmp_path / "short.csv")
    with pytest.raises(ValueError, match=r"short.csv has no column seed, commit"):
        records.read(tmp_path / "short.csv")


def test_rows_of_a_table_are_matched_by_everything(tmp_path):
    from types import SimpleNamespace

    leave(tmp_path / "a", [row(), row(seed=2), row(shots=4), row(label="gda", val=90.0), row(aux="another")])
    source = SimpleNamespace(encoders=("open_clip:RN50-quickgelu/openai", "mocov3:m.pth.tar"))
    keys = {"dataset": "imagenet@16/1", "test": "", "shots": 16, "seed": 1, "protocol": "val"}
    ours = records.matching(records.table([tmp_path]), source, **keys)
    assert list(ours.index) == ["amu", "gda"] and ours.loc["gda", "judged"] == 0.9
    assert ours.loc["amu", "accuracy"] == 0.69 and ours.loc["amu", "chosen"] == {"beta": 3.0}
    assert records.matching(records.table([tmp_path]), source, **keys | {"protocol": "oracle"}).empty
