"""Accuracy, calibration, complementarity: by hand, by resampling, or by a plain loop."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from lib import metrics


def test_accuracy_and_class_accuracy():
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 0, 0], [0, 0, 1]])
    y = torch.tensor([0, 1, 1, 2])
    assert metrics.accuracy(logits, y) == 0.75
    assert metrics.class_accuracy(logits, y).tolist() == [1, 0.5, 1]
    with pytest.raises(ValueError, match="1 of 4 rows of logits hold NaN"):
        metrics.accuracy(logits.index_fill(0, torch.tensor([2]), math.nan), y)


def test_accuracy_over_some_of_the_classes_and_without_foreign_images():
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 0, 0], [0, 0, 1]])
    y, classes = torch.tensor([0, 2, -1, 2]), torch.tensor([2, 0])
    assert metrics.correct(logits, y).tolist() == [True, False, False, True]
    assert metrics.correct(logits, y, classes).tolist() == [True, True, False, True]
    assert metrics.predictions(logits, classes).tolist() == [0, 2, 0, 2]
    assert metrics.accuracy(logits, y) == pytest.approx(2 / 3) and metrics.accuracy(logits, y, classes) == 1
    assert metrics.class_accuracy(logits, y)[[0, 2]].tolist() == [1, 0.5]
    assert math.isnan(metrics.accuracy(logits, torch.full((4,), -1)))
    assert math.isnan(metrics.accuracy(logits[:0], y[:0]))
    assert metrics.correct(logits, torch.full((4,), -1), classes[:0]).tolist() == [False] * 4


def test_class_means_of_rows_of_any_shape():
    values, y = torch.arange(12.0).view(3, 2, 2), torch.tensor([2, 0, 2])
    means = metrics.class_means(values, y, 3)
    assert torch.equal(means[2], values[[0, 2]].mean(0)) and torch.equal(means[0], values[1])
    assert means[1].isnan().all() and metrics.class_means(values.double(), y, 3).dtype == torch.float64


def test_calibration_of_a_perfectly_calibrated_and_of_an_overconfident_classifier():
    p = torch.full((1000, 2), 0.3)
    p[:, 0] = 0.7
    y = (torch.arange(1000) >= 700).long()
    assert metrics.calibration_error(p.log(), y) == pytest.approx(0, abs=1e-5)
    assert metrics.calibration_error(100 * p.log(), y) == pytest.approx(0.3, abs=1e-5)
    assert metrics.brier(p.log(), y) == pytest.approx(2 * 0.7 * 0.3, abs=1e-5)
    table = metrics.reliability(p.log(), y)
    assert len(table) == 1 and table.iloc[0].to_dict() == pytest.approx({"confidence": 0.7, "accuracy": 0.7})
    both = metrics.calibration(p.log(), y)
    assert both == pytest.approx({"accuracy": 0.7, "confidence": 0.7, "gap": 0, "ece": 0, "brier": 0.42}
                                 | {"nll": -0.7 * math.log(0.7) - 0.3 * math.log(0.3)}, abs=1e-5)  # fmt: skip
    perfect = metrics.reliability(1e4 * torch.eye(3), torch.arange(3))
    assert perfect.iloc[0].to_dict() == {"confidence": 1, "accuracy": 1}


def test_reliability_is_the_mean_in_each_bin():
    g = torch.Generator().manual_seed(0)
    logits, y = 3 * torch.randn(300, 4, generator=g), torch.randint(4, (300,), generator=g)
    top, hits = logits.softmax(1).amax(1), logits.argmax(1) == y
    table = metrics.reliability(logits, y, bins=5)
    bins = [(top > low) & (top <= low + 0.2) for low in (0.2, 0.4, 0.6, 0.8)]
    assert table["confidence"].tolist() == pytest.approx([top[b].mean().item() for b in bins], abs=1e-6)
    assert table["accuracy"].tolist() == pytest.approx([hits[b].float().mean().item() for b in bins])


def test_complementarity_runs_from_0_to_2_and_ignores_scale():
    s = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert metrics.complementarity(s, 3 * s) == pytest.approx(0, abs=1e-6)
    assert metrics.complementarity(s, -s) == pytest.approx(2, abs=1e-6)
    assert metrics.complementarity(s + 50, s, centred=True) == pytest.approx(0, abs=1e-5)
    assert metrics.complementarity(s + 50, s) > 0.5


def test_overlap_adds_up():
    first, second = torch.tensor([1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 1, 0, 1]).bool()
    parts = metrics.overlap(first, second)
    assert sum(parts[k] for k in ("both", "first_only", "second_only", "neither")) == pytest.approx(1)
    assert parts["oracle_gain"] == pytest.approx(0.2) and parts["disagreement"] == pytest.approx(0.5)
    assert math.isnan(metrics.overlap(first | True, second)["disagreement"])


def test_repaired_and_broken():
    y = torch.tensor([0, 0, 1])
    before, after = torch.eye(2)[[0, 1, 0]], torch.eye(2)[[1, 0, 0]]
    repaired, broken = metrics.repaired_and_broken(before, after, y)
    assert repaired.tolist() == [1] and broken.tolist() == [0]


def test_cka_is_blind_to_rotation_and_scale():
    g = torch.Generator().manual_seed(0)
    x, other = torch.randn(200, 6, generator=g), torch.randn(200, 6, generator=g)
    q = torch.linalg.qr(torch.randn(6, 6, generator=g)).Q
    assert metrics.cka(x, 5 * x @ q + 3) == pytest.approx(1)
    assert metrics.cka(x, other) < 0.1
    table = metrics.cka_table({"x": x, "other": other})
    assert table.loc["x", "other"] == table.loc["other", "x"] == metrics.cka(x, other) and table.loc["x", "x"] == 1


def test_error_auroc_is_the_chance_that_an_error_is_more_uncertain():
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(80, 4, generator=g), torch.randint(4, (80,), generator=g)
    u = torch.rand(80, generator=g).round(decimals=1)
    wrong = logits.argmax(1) != y
    gap = u[wrong][:, None] - u[~wrong]
    chance = ((gap > 0).float() + 0.5 * (gap == 0)).mean().item()
    assert metrics.error_auroc(u, logits, y) == pytest.approx(chance)
    assert math.isnan(metrics.error_auroc(u, logits, logits.argmax(1)))
    assert all(map(math.isnan, metrics.error_auroc_interval(u, logits, logits.argmax(1))))


def test_error_auroc_interval_is_that_of_resampled_images():
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(400, 4, generator=g), torch.randint(4, (400,), generator=g)
    wrong = logits.argmax(1) != y
    u = torch.randn(400, generator=g) + wrong
    area, half = metrics.error_auroc_interval(u, logits, y)
    assert area == pytest.approx(metrics.error_auroc(u, logits, y))
    draws = [torch.randint(400, (400,), generator=g) for _ in range(500)]
    spread = np.std([metrics.error_auroc(u[d], logits[d], y[d]) for d in draws])
    assert half == pytest.approx(1.96 * spread, rel=0.15)


def test_quantile_groups_are_equally_large_and_ordered():
    groups = metrics.quantile_groups(torch.tensor([5.0, 1, 4, 2, 3, 3]), 3)
    assert groups.tolist() == [2, 0, 2, 0, 1, 1]
    assert metrics.quantile_groups(torch.zeros(40), 4).bincount().tolist() == [10, 10, 10, 10]


def test_middle_of_best():
    scores = torch.tensor([[1.0, 2, 2, 2, 0], [3, 1, 3, 1, 1], [0, 0, 0, 0, 5]])
    assert metrics.middle_of_best(scores).tolist() == [2, 0, 4]
    assert metrics.middle_of_best(scores[0]).item() == 2


def test_the_papers_rule_takes_what_is_high_in_both():
    superiority = pd.Series({"a": 0.9, "b": 0.8, "c": 0.3, "d": 0.1})
    assert metrics.top_of_both(superiority, pd.Series({"a": 0.1, "b": 0.7, "c": 0.8, "d": 0.9})) == "b"
    assert metrics.top_of_both(superiority, pd.Series({"a": 0.9, "b": 0.7, "c": 0.8, "d": 0.1})) == "a"
    assert metrics.top_of_both(superiority, pd.Series({"a": 0.6, "b": 0.7, "c": 0.1, "d": 0.1})) == "a"


def test_count_numbers():
    assert metrics.count_numbers(torch.zeros(3, 4)) == 12
    assert metrics.count_numbers([torch.zeros(3), [torch.zeros(2, 2)]]) == 7 and metrics.count_numbers([]) == 0


def test_balanced_accuracy_and_the_worst_class_and_group():
    logits = torch.eye(3)[[0, 0, 0, 1, 1, 2]]
    y = torch.tensor([0, 0, 0, 0, 1, -1])
    assert metrics.accuracy(logits, y) == pytest.approx(0.8)
    assert metrics.balanced_accuracy(logits, y) == pytest.approx(0.875), "class 2 has no images"
    assert metrics.worst_class(logits, y) == pytest.approx(0.75)
    only = torch.tensor([0, 2])  # class 0 is then all right
    assert metrics.balanced_accuracy(logits, y, only) == 0.5 and metrics.worst_class(logits, y, only) == 0
    hits = torch.tensor([True, True, False, True, False, False])
    assert metrics.worst_group(hits, torch.tensor([0, 0, 0, 5, 5, 5])) == pytest.approx(1 / 3), "empty groups are none"
    nothing = torch.full((6,), -1)
    assert all(math.isnan(one(logits, nothing)) for one in (metrics.balanced_accuracy, metrics.worst_class))


def test_effective_robustness_is_the_distance_from_the_line_of_models():
    odds = np.array([0.25, 1.0, 4.0])
    accuracy, shifted = odds / (1 + odds), 0.5 * odds**2 / (1 + 0.5 * odds**2)
    line = metrics.robustness_line(accuracy, shifted)
    assert line == pytest.approx((2, math.log(0.5)))
    assert metrics.effective_robustness(accuracy, shifted, line) == pytest.approx(0, abs=1e-12)
    above = metrics.effective_robustness(accuracy, shifted + 0.03, line)
    assert above == pytest.approx(0.03), "points of accuracy, not of its logit"
    assert np.isfinite(metrics.effective_robustness([0.0, 1.0], [1.0, 0.0], line)).all()
    assert np.isnan(metrics.robustness_line([0.5, 0.5], [0.2, 0.3])).all(), "one accuracy gives no line"
