"""Intervals, paired tests, ranks, Shapley contributions."""

import math

import pandas as pd
import pytest
from scipy import stats

from lib import statistics


def test_shapley_contributions_add_up_and_split_an_interaction_evenly():
    contributions = statistics.shapley(lambda on: 3.0 * ("a" in on) + 2.0 * ({"a", "b"} <= on), ["a", "b", "c"])
    assert contributions == pytest.approx({"a": 4, "b": 1, "c": 0})


def test_mean_interval_is_the_t_interval():
    mean, half = statistics.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert math.isnan(statistics.mean_interval([1.0])[1])


def test_holm_steps_down():
    assert statistics.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])


def test_interval_table_has_a_row_per_label_and_shots_and_no_interval_for_one_seed():
    results = [("b", 1, 0.5), ("b", 1, 0.7), ("a", 4, 0.9), ("b", 4, 0.8)]
    results = pd.DataFrame(results, columns=["label", "shots", "accuracy"])
    table = statistics.interval_table(results).set_index(["label", "shots"])
    assert table.index.tolist() == [("b", 1), ("a", 4), ("b", 4)], "in the order of the results"
    mean, half = statistics.mean_interval([0.5, 0.7])
    assert table.loc[("b", 1)].tolist() == pytest.approx([100 * mean, 100 * half])
    assert table.loc[("a", 4), "mean"] == pytest.approx(90) and math.isnan(table.loc[("a", 4), "half"])


def test_paired_differences_over_seeds_have_one_kind_of_interval():
    scores = pd.DataFrame({"a": [0.60, 0.62, 0.64], "b": [0.50, 0.53, 0.53], "c": [0.61, 0.61, 0.65]})
    table = statistics.against(scores, "a")
    mean, half = statistics.mean_interval(scores["b"] - scores["a"])
    assert tuple(table.loc["b", ["difference", "half"]]) == (mean, half)
    assert table.loc["b", "p"] == pytest.approx(stats.ttest_rel(scores["b"], scores["a"]).pvalue)
    assert table["verdict"].to_dict() == {"b": "worse", "c": "tie"}
    alone = statistics.against(scores[:1], "a")
    assert set(alone["verdict"]) == {"–"} and alone["half"].isna().all(), "one seed gives no verdict"
    same = statistics.paired(scores["a"], scores["a"])
    assert same == {"difference": 0.0, "half": 0.0, "p": 1.0}
    assert statistics.pm(62.44, float("nan")) == "62.4 ± –" and statistics.pm(1.26, 0.5, sign=True) == "+1.3 ± 0.5"


def test_what_cannot_be_tested_gets_no_verdict_and_does_not_count_in_holms_correction():
    corrected = statistics.holm([0.01, float("nan"), 0.03])
    assert corrected[[0, 2]].tolist() == pytest.approx([0.02, 0.03]) and math.isnan(corrected[1])
    scores = pd.DataFrame({"a": [0.60, 0.62, 0.64], "b": [0.50, 0.53, 0.53], "none": [float("nan")] * 3})
    table = statistics.against(scores, "a")
    assert table["verdict"].to_dict() == {"b": "worse", "none": "–"}
    assert table.loc["b", "p_holm"] == table.loc["b", "p"]
