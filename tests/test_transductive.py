"""Transductive predictors against the authors' own code."""

from dataclasses import replace

import authors
import pytest
import torch

from lib import predictors
from lib.predictors import transductive
from lib.tasks import FewShotTask

CLOSE = 1e-4  # relative to the spread of the reference


@pytest.fixture(scope="module")
def task():
    return authors.task()


@pytest.mark.parametrize("few_shot", [True, False])
def test_transclip_agrees_in_a_consistent_row_order(task, few_shot):
    theirs = authors.outputs("transclip")["fs_rows_reordered/z" if few_shot else "zs/z"]
    found = predictors.TransCLIP(use_support=few_shot).fit(task).logits(task.test).softmax(1)
    assert authors.error(found, theirs) < CLOSE


@pytest.mark.parametrize(
    ("delta", "gamma", "key"),
    [
        (0.3, 1.3 / 2.5, "corrected_dist_rows_fp32_logits"),
        (0.0, 1.3 / 2.5, "corrected_delta0_fp32_logits"),
        (0.0, 0.0, "corrected_delta0_gamma0_fp32_logits"),
    ],
)
def test_m_adapter_agrees_with_the_formula(monkeypatch, delta, gamma, key):
    inputs, theirs = authors.outputs("scores_inputs"), authors.outputs("caps_madapter")
    support = theirs["support_idx"]

    def part(name, rows=slice(None)):
        x = inputs[f"img_{name}"][rows]
        return {"clip": x, "aux": x, "y": inputs[f"y_{name}"][rows]}

    task = FewShotTask.from_arrays(
        text=inputs["text"], support=part("train", support), val=part("val"), test=part("test")
    )
    adapter = predictors.MAdapter(delta=delta, gamma=gamma).fit(task, captions=inputs["cap_train"][support])
    bias = adapter.logits(task.test)
    assert authors.error(task.test.zero_shot + 2.5 * bias, theirs[key]) < CLOSE
    monkeypatch.setattr(transductive, "CHUNK", 100)
    assert torch.allclose(adapter.logits(task.test), bias, atol=1e-4)


@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_m_adapter_of_unequal_classes_sums_over_their_own_images(task, delta):
    few = authors.unequal(task)
    adapter = predictors.MAdapter(delta=delta).fit(few)
    log_p = [(part.zero_shot / 50).log_softmax(1) for part in (task.test, few.support)]
    kl = (log_p[0].exp()[:, None] * (log_p[0][:, None] - log_p[1])).sum(-1)
    captions = few.text[few.support.y]
    affinity = (1 - delta) * task.test.clip @ few.support.clip.T + delta * task.test.clip @ captions.T
    rescaled = affinity.min() + (kl - kl.min()) * (affinity.max() - affinity.min()) / (kl.max() - kl.min())
    each = torch.exp(-5.5 * (1 - affinity)) - 0.5 * rescaled
    expected = torch.stack([each[:, few.support.y == c].sum(1) for c in range(few.num_classes)], dim=1)
    assert authors.error(adapter.logits(task.test), expected) < CLOSE
    assert authors.error(next(adapter.logits_grid(task.test, [{}])), expected) < CLOSE


def test_large_grids_of_m_adapter_are_computed_in_chunks(task, monkeypatch):
    adapter = predictors.MAdapter().fit(authors.unequal(task))
    grid = [{"gamma": 2.0}, {"delta": 0.0}, {"sharpness": 2.0}]
    together = list(adapter.logits_grid(task.test, grid))
    monkeypatch.setattr(transductive, "CHUNK", 7)
    for logits, other in zip(adapter.logits_grid(task.test, grid), together, strict=True):
        assert authors.error(logits, other) < CLOSE


def test_transclip_takes_unequal_classes_in_any_order(task):
    few = authors.unequal(task)
    by_class = replace(few, support=few.support.rows(torch.argsort(few.support.y)))
    logits = predictors.TransCLIP().fit(few).logits(task.test)
    assert torch.isfinite(logits).all()
    assert authors.error(predictors.TransCLIP().fit(by_class).logits(task.test), logits) < CLOSE


def test_transclip_without_support_needs_no_shots(task):
    one = predictors.TransCLIP(use_support=False).fit(task).logits(task.test)
    other = predictors.TransCLIP(use_support=False).fit(authors.unequal(task)).logits(task.test)
    assert torch.equal(one, other)


@pytest.mark.parametrize("predictor", [predictors.MAdapter(), predictors.TransCLIP()])
def test_logits_of_a_row_depend_on_the_rows_around_it(task, predictor):
    assert predictor.per_batch
    rows = torch.arange(40)
    logits = predictor.fit(task).logits(task.test)[rows]
    assert authors.error(predictor.logits(task.test.rows(rows)), logits) > 0.01
