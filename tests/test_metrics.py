import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lib import fusion, methods, metrics, runs, statistics


def test_accuracy_and_class_accuracy():
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 0, 0], [0, 0, 1]])
    y = torch.tensor([0, 1, 1, 2])
    assert metrics.accuracy(logits, y) == 0.75
    assert metrics.class_accuracy(logits, y).tolist() == [1, 0.5, 1]
    with pytest.raises(ValueError, match="1 of 4 rows of logits hold NaN"):
        metrics.accuracy(logits.index_fill(0, torch.tensor([2]), math.nan), y)


def test_calibration_of_a_perfectly_calibrated_and_of_an_overconfident_classifier():
    p = torch.full((1000, 2), 0.3)
    p[:, 0] = 0.7
    y = (torch.arange(1000) >= 700).long()
    assert metrics.calibration_error(p.log(), y) == pytest.approx(0, abs=1e-5)
    assert metrics.calibration_error(100 * p.log(), y) == pytest.approx(0.3, abs=1e-5)
    assert metrics.brier(p.log(), y) == pytest.approx(2 * 0.7 * 0.3, abs=1e-5)
    table = metrics.reliability(p.log(), y)
    assert table["count"].sum() == 1000 and table["accuracy"].iloc[0] == pytest.approx(0.7)


def test_complementarity_runs_from_0_to_2_and_ignores_scale():
    s = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert metrics.complementarity(s, 3 * s) == pytest.approx(0, abs=1e-6)
    assert metrics.complementarity(s, -s) == pytest.approx(2, abs=1e-6)
    assert metrics.complementarity(s + 50, s, centred=True) == pytest.approx(0, abs=1e-5)
    assert metrics.complementarity(s + 50, s) > 0.5


def test_overlap_adds_up():
    first, second = torch.tensor([1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 1, 0, 1]).bool()
    found = metrics.overlap(first, second)
    assert sum(found[k] for k in ("both", "first_only", "second_only", "neither")) == pytest.approx(1)
    assert found["oracle_gain"] == pytest.approx(0.2) and found["disagreement"] == pytest.approx(0.5)


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


def test_error_auroc_agrees_with_scikit_learn():
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(80, 4, generator=g), torch.randint(4, (80,), generator=g)
    u = torch.rand(80, generator=g).round(decimals=1)
    wrong = logits.argmax(1) != y
    assert metrics.error_auroc(u, logits, y) == pytest.approx(roc_auc_score(wrong, u))


def test_error_auroc_interval_is_that_of_resampled_images():
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(400, 4, generator=g), torch.randint(4, (400,), generator=g)
    wrong = logits.argmax(1) != y
    u = torch.randn(400, generator=g) + wrong
    found, half = metrics.error_auroc_interval(u, logits, y)
    assert found == pytest.approx(metrics.error_auroc(u, logits, y))
    draws = [torch.randint(400, (400,), generator=g) for _ in range(500)]
    spread = np.std([metrics.error_auroc(u[d], logits[d], y[d]) for d in draws])
    assert half == pytest.approx(1.96 * spread, rel=0.15)


def test_quantile_groups_are_equally_large_and_ordered():
    groups = metrics.quantile_groups(torch.tensor([5.0, 1, 4, 2, 3, 3]), 3)
    assert groups.tolist() == [2, 0, 2, 0, 1, 1]


def test_middle_of_best():
    scores = torch.tensor([[1.0, 2, 2, 2, 0], [3, 1, 3, 1, 1], [0, 0, 0, 0, 5]])
    assert metrics.middle_of_best(scores).tolist() == [2, 0, 4]
    assert metrics.middle_of_best(scores[0]).item() == 2


def test_the_papers_rule_takes_what_is_high_in_both():
    superiority = pd.Series({"a": 0.9, "b": 0.8, "c": 0.3, "d": 0.1})
    assert metrics.top_of_both(superiority, pd.Series({"a": 0.1, "b": 0.7, "c": 0.8, "d": 0.9})) == "b"
    assert metrics.top_of_both(superiority, pd.Series({"a": 0.9, "b": 0.7, "c": 0.8, "d": 0.1})) == "a"
    assert metrics.top_of_both(superiority, pd.Series({"a": 0.6, "b": 0.7, "c": 0.1, "d": 0.1})) == "a"


def test_shapley_shares_add_up_and_split_an_interaction_evenly():
    shares = statistics.shapley(lambda on: 3.0 * ("a" in on) + 2.0 * ({"a", "b"} <= on), ["a", "b", "c"])
    assert shares == pytest.approx({"a": 4, "b": 1, "c": 0})


def test_mean_interval_is_the_t_interval():
    mean, half = statistics.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert math.isnan(statistics.mean_interval([1.0])[1])


def test_paired_bootstrap_sees_a_clear_difference_and_no_difference():
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.random((3, 500)) < 0.6)
    better = base | torch.from_numpy(rng.random((3, 500)) < 0.2)
    clear = statistics.paired_bootstrap(better, base, rng)
    assert clear["low"] > 0 and clear["p"] < 0.01
    assert statistics.paired_bootstrap(base, base, rng)["difference"] == 0
    shuffled = base[:, torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    assert statistics.paired_bootstrap(shuffled, base, rng)["p"] > 0.2


def test_holm_and_signed_rank():
    assert statistics.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    rng = np.random.default_rng(0)
    base = rng.random(20)
    scores = pd.DataFrame({"amu": base, "worse": base - 0.1 - 0.01 * rng.random(20), "same": base})
    assert statistics.signed_rank_table(scores, "amu")["verdict"].to_dict() == {"worse": "worse", "same": "tie"}


def test_mean_ranks_and_cliques():
    scores = pd.DataFrame({"a": [3.0, 3, 3], "b": [2.0, 2, 2], "c": [1.0, 1, 1]})
    ranks, difference = statistics.mean_ranks(scores)
    assert ranks.to_dict() == {"a": 1, "b": 2, "c": 3}
    assert difference == pytest.approx(2.3437 * math.sqrt(12 / 18), abs=1e-3)
    assert statistics.cliques(ranks, 1.0) == [("a", "b"), ("b", "c")]
    assert statistics.cliques(ranks, 0.5) == []


def test_judging_fusions_takes_beta_from_the_held_out_images_alone(make_task):
    task = make_task(classes=4, n_val=40, n_test=80)
    on, test = task.val, task.test
    bias = [split.aux @ split.aux.new_ones(task.support.aux.shape[1], 4).cumsum(1) for split in (on, test)]
    rules = {name: fusion.FUSIONS[name] for name in ("fixed", "learned", "wise", "replace")}
    found = methods.compare_fusions(rules, on, bias[0], test, bias[1], (1.0, 0.0, 0.5))
    assert list(found.index) == list(rules) and math.isnan(found["beta"]["replace"])
    for name, row in found.drop("replace").iterrows():
        assert row["held"] == metrics.accuracy(rules[name](on.zero_shot, bias[0], row["beta"]), on.y)
        assert row["accuracy"] == metrics.accuracy(rules[name](test.zero_shot, bias[1], row["beta"]), test.y)
    assert found["held"]["fixed"] == max(metrics.accuracy(on.zero_shot + b * bias[0], on.y) for b in (0.0, 0.5, 1.0))
    assert found["accuracy"]["replace"] == metrics.accuracy(bias[1], test.y)
    flat = methods.compare_fusions({"fixed": fusion.additive}, on, 0 * bias[0], test, bias[1], (1.0, 0.01, 5.0, 0.2, 9.0))
    assert flat["beta"]["fixed"] == 1.0, "the middle of equals"
    relabelled = replace(test, y=(test.y + 1) % 4)
    again = methods.compare_fusions(rules, on, bias[0], relabelled, bias[1], (1.0, 0.0, 0.5))
    assert again["beta"].dropna().tolist() == found["beta"].dropna().tolist()


def test_count_numbers():
    assert metrics.count_numbers(torch.zeros(3, 4)) == 12
    assert metrics.count_numbers([torch.zeros(3), [torch.zeros(2, 2)]]) == 7 and metrics.count_numbers([]) == 0


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
