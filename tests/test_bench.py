"""The plain loops that speed is measured against give what ours gives, and the measures mean what they say."""

import json
import math

import bench
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from lib import methods, metrics, predictors, tasks

SMALL = {"classes": 5, "shots": 3, "dim": 12, "aux_dim": 16, "test_images": 10}


def test_ways_are_run_in_turns_and_the_ratio_is_taken_in_pairs():
    order = []
    table = bench.in_turns({"slow": lambda: order.append("slow"), "fast": lambda: order.append("fast")}, 3)
    assert order == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert list(table.columns) == ["slow", "fast"] and len(table) == 3 and (table > 0).all().all()
    given = pd.DataFrame({"slow": [2.0, 9.0, 8.0], "fast": [1.0, 3.0, 2.0]})
    assert bench.ratio(given["slow"], given["fast"]) == (3.0, 2.0, 4.0)


def test_plain_heads_end_where_ours_do():
    task = bench.random_task(**SMALL)
    settings = [{"lam": 0.5, "beta": 5.0}, {"lam": 0.2, "beta": 1.0}]
    plain = bench.plain_heads(task, settings, epochs=4)
    fitted = predictors.MultiBranchHead.fit_many(task, [setting | {"epochs": 4} for setting in settings])
    ours = torch.stack([head.weight_ for head in fitted])
    start = metrics.class_means(task.support.aux, task.support.y, 5)
    assert (ours - plain).abs().max() < 1e-6
    assert (ours - start).abs().max() > 1e-3 and (ours[0] - ours[1]).abs().max() > 1e-5


def test_the_plain_grid_has_the_accuracy_of_one_pass():
    task = bench.random_task(**SMALL | {"shots": 4})
    grid = methods.METHODS["tip_adapter"].post_grid
    best = bench.plain_tip_adapter(task, grid["sharpness"], grid["beta"])
    ours = methods.build("tip_adapter").fit(task).val_accuracy_
    assert ours == pytest.approx(best, abs=1e-6)


def test_a_random_bank_is_the_random_task(tmp_path):
    sizes = SMALL | {"shots": 2}
    source = tasks.load_source(bench.random_bank(tmp_path / "bank", **sizes))
    drawn, task = tasks.sample(source, 2, seed=1), bench.random_task(**sizes)
    assert torch.equal(drawn.test.y, task.test.y) and torch.allclose(drawn.test.zero_shot, task.test.zero_shot)
    assert torch.equal(drawn.support.aux.sort(dim=0).values, task.support.aux.sort(dim=0).values)


def test_random_features_are_learnable_and_reproducible():
    task, again = (bench.random_task(classes=50, shots=8, dim=256, aux_dim=256) for _ in range(2))
    assert torch.equal(task.test.aux, again.test.aux)
    zero_shot = metrics.accuracy(task.test.zero_shot, task.test.y)
    assert 0.4 < zero_shot < 0.9
    assert metrics.accuracy(methods.build("amu_convex").fit(task).logits(task.test), task.test.y) > zero_shot + 0.05


def test_threads_are_given_back():
    before = torch.get_num_threads()
    assert bench.on_threads(2, torch.get_num_threads) == 2
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        bench.on_threads(2, lambda: 1 / 0)
    assert torch.get_num_threads() == before


def test_the_machine_is_measured():
    host = bench.machine(64)
    assert {"processor", "cores", "threads", "torch"} <= set(host)
    assert host["product_rate"] > 0 and host["bandwidth"] > 0
    assert 0.05 < bench.peak_memory() < 100


def test_the_figure_and_the_table_name_every_claim():
    row = {"title": "two\nlines", "plain": 2.0, "ours": 1.0, "limit": 0.5, "ratio": (2.0, 1.5, 2.5), "aim": 3.0}
    table = pd.DataFrame(
        {"heads": row | {"cost": ("points", 0.25)}, "grid": row | {"aim": 2.0, "cost": ("points", 0.0)}}
    ).T
    printed = bench.readable(table)
    assert list(printed["verdict"]) == ["MISSED", "reached"] and list(printed.index) == ["two lines"] * 2
    assert printed["ratio"].iloc[0] == "2 (1.5 to 2.5)" and printed["cost"].iloc[0] == "points 0.2"
    fig = bench.draw(table)
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["two\nlines"] * 2
    plt.close(fig)


def test_a_quick_benchmark_leaves_a_record_and_a_figure(tmp_path, capsys):
    folder, threads = tmp_path / "bench", torch.get_num_threads()
    bench.main(["--quick", "--folder", str(folder)])
    record = json.loads((folder / "metrics.json").read_text())
    assert record["notebook"] == "bench" and record["parameters"] == {"quick": True}
    claims = record["metrics"]["claims"]
    assert set(claims) == set(bench.AIMS)
    for row in claims.values():
        middle, low, high = row["ratio"]
        assert low == middle == high == pytest.approx(row["plain"] / row["ours"]), "one turn is its own median"
        assert row["limit"] is None or row["limit"] > 0
    assert claims["heads"]["cost"][1] < 1e-6 and claims["extraction"]["cost"][1] < 1e-5
    assert abs(claims["grid"]["cost"][1]) < 1e-3
    assert record["metrics"]["table_minutes"] > 0
    assert 0.1 < record["metrics"]["large"]["gib"] < 4 and math.isfinite(record["metrics"]["large"]["accuracy"])
    assert record["metrics"]["import_s"]["lib"] < record["metrics"]["import_s"]["torch"], "lib itself imports nothing"
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["speed.png", "speed.svg"]
    printed = capsys.readouterr().out
    assert "Tip-Adapter's grid" in printed and "2 methods x 2 tasks" in printed
    assert torch.get_num_threads() == threads
