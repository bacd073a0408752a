"""The plain loops that speed is measured against give what ours gives, and the measures mean what they say."""

import pandas as pd
import pytest
import torch

import bench
from lib import fusion, methods, metrics, tasks
from lib.predictors import training


def test_ways_are_run_in_turns_and_the_ratio_is_taken_in_pairs():
    order = []
    table = bench.in_turns({"slow": lambda: order.append("slow"), "fast": lambda: order.append("fast")}, 3)
    assert order == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert list(table.columns) == ["slow", "fast"] and len(table) == 3 and (table > 0).all().all()
    told = pd.DataFrame({"slow": [2.0, 9.0, 8.0], "fast": [1.0, 3.0, 2.0]})
    assert bench.ratio(told["slow"], told["fast"]) == (3.0, 2.0, 4.0)


def test_plain_heads_end_where_ours_do():
    task = bench.random_task(classes=5, shots=3, dim=12, aux_dim=16, test_images=10)
    settings = [{"lr": 1e-3, "weight_decay": 0.01, "lam": 0.5, "beta": 5.0}]
    settings.append(settings[0] | {"lam": 0.2, "lr": 1e-2})
    factor = fusion.uncertainty(task.support.zero_shot)
    orders = torch.stack([training.epoch_orders(15, 4, torch.Generator().manual_seed(i)) for i in range(2)])
    plain = bench.plain_heads(task, settings, factor, orders)
    start = metrics.class_means(task.support.aux, task.support.y, 5).expand(2, -1, -1)
    columns = {name: [setting[name] for setting in settings] for name in settings[0]}
    support = (task.support.aux[None], task.support.zero_shot[None], task.support.y)
    ours = training.train_heads(*support, start, orders, **columns, factor=factor.expand(2, 1, -1))
    assert (ours.weight - plain).abs().max() < 1e-6
    assert (ours.weight - start).abs().max() > 1e-3


def test_the_plain_grid_finds_the_accuracy_that_one_pass_finds():
    task = bench.random_task(classes=5, shots=4, dim=12, aux_dim=16, test_images=10)
    grid = methods.METHODS["tip_adapter"].grid
    best = bench.plain_tip_adapter(task, grid["sharpness"], grid["beta"])
    ours = methods.build("tip_adapter").fit(task).val_accuracy_
    assert ours == pytest.approx(best, abs=1e-6)


def test_a_random_bank_is_the_random_task(tmp_path):
    sizes = {"classes": 4, "shots": 2, "dim": 8, "aux_dim": 6, "test_images": 10}
    bank = tasks.load_source(bench.random_bank(tmp_path / "bank", **sizes))
    drawn, task = tasks.sample(bank, 2, seed=1), bench.random_task(**sizes)
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


def test_the_machine_is_told():
    assert {"processor", "cores", "threads", "torch"} <= set(bench.machine())
    assert bench.product_rate(64, 2) > 0 and bench.bandwidth(2**16, 2) > 0
    assert 0.05 < bench.peak_memory() < 100
