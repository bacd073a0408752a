"""Predictors that learn in the space of texts against the authors' own code: logits, trained weights, losses."""

from dataclasses import replace

import authors
import pytest
import torch

from lib import metrics, predictors

CLOSE = 1e-4  # relative to the spread of the reference


@pytest.fixture(scope="module")
def task():
    return authors.task()


def test_taskres_agrees(task):
    theirs = authors.outputs("taskres")
    taskres = predictors.TaskRes(epochs=10, batch_size=16).fit(task, orders=theirs["train/perms"])
    assert authors.error(taskres.losses_, theirs["train/losses"]) < CLOSE
    assert authors.error(taskres.residual_, theirs["train/residual_final"]) < CLOSE
    assert authors.error(taskres.logits(task.test), theirs["train/test_logits"]) < CLOSE
    taskres.residual_ = theirs["residual_given"]
    assert authors.error(taskres.logits(task.test), theirs["test_logits_given"]) < CLOSE


def test_clip_adapter_agrees(task):
    theirs = authors.outputs("clip_adapter")
    adapter = predictors.CLIPAdapter(epochs=10, batch_size=16)
    fitted = adapter.fit(task, start=(theirs["W1"], theirs["W2"]), orders=theirs["train/perms"])
    assert authors.error(fitted.losses_, theirs["train/losses"]) < CLOSE
    assert authors.error(fitted.down_, theirs["train/W1_final"]) < CLOSE
    assert authors.error(fitted.up_, theirs["train/W2_final"]) < CLOSE
    assert authors.error(fitted.logits(task.test), theirs["train/test_logits"]) < CLOSE
    fitted.down_, fitted.up_ = theirs["W1"], theirs["W2"]
    assert authors.error(fitted.logits(task.test), theirs["test_logits_given"]) < CLOSE


@pytest.mark.parametrize("constraint", ["none", "l2"])
@pytest.mark.parametrize(("texts", "lr"), [("unit", 0.0015), ("scaled", 0.1)])
def test_text_probe_and_clap_agree(task, texts, lr, constraint):
    theirs = authors.outputs("clap")
    start = task.text if texts == "unit" else theirs["base_text_scaled"]
    probe = predictors.TextProbe(constraint=constraint, lr=lr, epochs=20, batch_size=16)
    fitted = probe.fit(task, start=start, orders=theirs["train/perms"])
    key = f"train/{texts}/{constraint}"
    assert authors.error(fitted.losses_, theirs[f"{key}/losses"]) < CLOSE
    assert authors.error(fitted.weight_, theirs[f"{key}/prototypes"]) < CLOSE
    assert authors.error(fitted.logits(task.test), theirs[f"{key}/test_logits"]) < CLOSE


@pytest.mark.parametrize("constraint", ["l2", "l2-balanced", "l2-corrected", "l2-constant"])
def test_penalties_of_clap_agree(task, constraint):
    theirs = authors.outputs("clap")
    probe = predictors.TextProbe(constraint=constraint, epochs=1).fit(task)
    assert torch.allclose(probe.multipliers_, theirs[f"lambda/{constraint}"], atol=1e-5)
    penalty = probe.penalty(theirs["weights_perturbed"], task.text)
    assert penalty.item() == pytest.approx(theirs[f"penalty/{constraint}"].item(), rel=1e-4)


@pytest.mark.parametrize("wise", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["cross_modal", "uni_modal"])
def test_cross_modal_agrees(task, kind, wise):
    theirs = authors.outputs("cross_modal")
    orders = {"orders": theirs["train/image_perms"], "text_orders": theirs["train/text_perms"]}
    settings = {"texts": kind == "cross_modal", "wise": wise, "iterations": 160, "evaluate_every": 40}
    fitted = predictors.CrossModal(**settings).fit(task, **orders)
    assert authors.error(fitted.lr * fitted.rates(), theirs[f"train/{kind}/lr"]) < CLOSE
    assert authors.error(fitted.losses_, theirs[f"train/{kind}/losses"]) < CLOSE
    selected = f"train/{kind}/test_logits_selected" + ("" if wise == 1 else "_wiseft0.5")
    assert authors.error(fitted.logits(task.test), theirs[selected]) < CLOSE
    last = predictors.CrossModal(**settings).fit(replace(task, val=None), **orders)
    if wise == 1:
        assert authors.error(last.logits(task.test), theirs[f"train/{kind}/test_logits_last_step"]) < CLOSE


@pytest.mark.parametrize("iterations", [10, 50])
def test_lp_plus_plus_agrees(task, iterations):
    theirs = authors.outputs("lp_plus_plus")
    probe = predictors.LPPlusPlus(iterations=iterations).fit(replace(task, val=None), intercept=theirs["bias_init"])
    key = f"epoch{iterations}"
    assert authors.error(probe.losses_, theirs["losses"][:iterations]) < CLOSE
    assert authors.error(probe.weight_, theirs[f"{key}/weight"]) < CLOSE
    assert torch.allclose(probe.alpha_, theirs[f"{key}/alpha"], rtol=1e-4)
    assert authors.error(probe.logits(task.test), theirs[f"{key}/test_logits"]) < CLOSE


@pytest.mark.parametrize(
    "predictor",
    [
        predictors.CLIPAdapter(epochs=20),
        predictors.TaskRes(epochs=20),
        predictors.TextProbe(epochs=20),
        predictors.TextProbe(epochs=20, constraint="l2"),
        predictors.LPPlusPlus(iterations=20),
    ],
)
def test_unequal_classes_are_learned_whatever_the_order_of_rows(task, predictor):
    few = authors.unequal(task)
    logits = predictor.fit(few).logits(task.test)
    assert torch.isfinite(logits).all()
    by_class = replace(few, support=few.support.rows(torch.argsort(few.support.y)))
    assert authors.error(predictor.fit(by_class).logits(task.test), logits) < 1e-3  # one batch holds all rows


def test_cross_modal_takes_unequal_classes(task):
    logits = predictors.CrossModal(iterations=40).fit(authors.unequal(task)).logits(task.test)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "predictor", [predictors.CLIPAdapter(epochs=20), predictors.TaskRes(epochs=20), predictors.TextProbe(epochs=20)]
)
def test_every_image_twice_is_every_image_once(task, predictor):
    few = authors.unequal(task)
    twice = replace(few, support=few.support.rows(torch.arange(len(few.support)).repeat(2)))
    assert authors.error(predictor.fit(twice).logits(task.test), predictor.fit(few).logits(task.test)) < 1e-3


def test_penalties_of_unequal_classes_are_means_over_their_own_images(task):
    few = authors.unequal(task)
    p, y = few.support.zero_shot.softmax(1), few.support.y
    expected = torch.stack([p[y == c, c].mean() for c in range(few.num_classes)])
    probe = predictors.TextProbe(constraint="l2", epochs=1).fit(few)
    assert torch.allclose(probe.multipliers_, expected, atol=1e-6)


def test_lp_plus_plus_of_unequal_classes_starts_at_class_sums(task):
    few = authors.unequal(task)
    x, y, cosine = few.support.clip, few.support.y, few.support.zero_shot / 100
    sums = torch.stack([x[y == c].sum(0) for c in range(few.num_classes)])
    alpha = 250 * cosine[torch.arange(len(y)), y].mean()
    first = torch.nn.functional.cross_entropy(x @ sums.T + alpha * cosine, y)
    assert predictors.LPPlusPlus(iterations=1).fit(few).losses_[0].item() == pytest.approx(first.item(), rel=1e-5)


def test_unknown_constraints_are_refused(task):
    with pytest.raises(ValueError, match=r"l2-balanced.*'l1'"):
        predictors.TextProbe(constraint="l1").fit(task)


@pytest.mark.parametrize("balanced", [False, True])
def test_ss_text_is_its_sum_over_images(task, balanced):
    few = authors.unequal(task)
    weights = []
    for c in range(few.num_classes):
        own = few.support.clip[few.support.y == c]
        lam = 1 / len(few.support) if balanced else 1 / len(own)
        w = few.text[c] + sum(x / (len(few.support) * lam * 0.01) for x in own)
        weights.append(w / w.norm())
    logits = predictors.SSText(balanced=balanced).fit(few).logits(few.test)
    assert authors.error(logits, 100 * few.test.clip @ torch.stack(weights).T) < 1e-5


def test_ss_text_of_equal_classes_mixes_text_and_mean(task):
    """With 1 / n_c the mean image weighs 100 n_c / C, with 1 / N it weighs 100 n_c."""
    mean = metrics.class_means(task.support.clip, task.support.y, 12)
    for balanced, weight in ((False, 400 * 4 / 48), (True, 400)):
        expected = 100 * task.test.clip @ torch.nn.functional.normalize(task.text + weight * mean, dim=1).T
        assert authors.error(predictors.SSText(balanced=balanced).fit(task).logits(task.test), expected) < 1e-5
