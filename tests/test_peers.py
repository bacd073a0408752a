"""Every peer against the authors' own code: logits, trained weights, losses, and whole search grids."""

from dataclasses import replace

import authors
import pytest
import torch

from lib import fusion, methods, metrics, predictors
from lib.predictors import transductive
from lib.tasks import FewShotTask

CLOSE = 1e-4  # relative to the spread of the reference


@pytest.fixture(scope="module")
def task():
    return authors.task()


@pytest.mark.parametrize(("key", "sharpness", "beta"), [("fixed0", 1.0, 1.17), ("fixed1", 5.5, 2.0)])
def test_cache_is_tip_adapters(task, key, sharpness, beta):
    theirs = authors.outputs("tip_adapter")
    votes = predictors.Cache(sharpness=sharpness).fit(task).logits(task.test)
    assert authors.error(votes, theirs[f"{key}/cache_logits_test"]) < CLOSE
    assert authors.error(task.test.zero_shot + beta * votes, theirs[f"{key}/tip_logits_test"]) < CLOSE


@pytest.mark.parametrize("trained", [False, True])
def test_grid_of_tip_adapter_agrees_in_every_cell(task, trained):
    theirs = authors.outputs("tip_adapter")
    cache = predictors.Cache().fit(task)
    if trained:
        cache.keys_ = theirs["F/keys_best_epoch"]
    betas = theirs["alpha_list"].tolist()
    settings = [{"sharpness": sharpness} for sharpness in theirs["beta_list"].tolist()]
    val = task.val
    grid = torch.tensor(
        [
            fusion.accuracy_over_beta(fusion.additive, val.zero_shot, votes, val.y, betas)
            for votes in cache.logits_grid(val, settings)
        ]
    )
    assert authors.error(100 * grid, theirs["F/val_acc_grid" if trained else "val_acc_grid"]) < 1e-6


def test_the_search_of_tip_adapter_ends_where_theirs_does(task):
    theirs = authors.outputs("tip_adapter")
    entry = replace(
        methods.METHODS["tip_adapter"],
        grid={"sharpness": theirs["beta_list"].tolist(), "beta": theirs["alpha_list"].tolist()},
    )
    method = methods.Method("tip_adapter", entry, "val", {}).fit(task)
    assert method.chosen_ == pytest.approx({"sharpness": 1.825, "beta": 2.565})
    assert authors.error(method.logits(task.test), theirs["tip_logits_test_best"]) < CLOSE


def test_trained_cache_follows_tip_adapter_f(task):
    theirs = authors.outputs("tip_adapter")
    cache = predictors.TrainedCache(epochs=5, batch_size=16).fit(task, orders=theirs["F/perms"])
    assert authors.error(cache.losses_, theirs["F/losses"]) < CLOSE
    assert authors.error(cache.keys_, theirs["F/keys_final"]) < CLOSE
    fused = task.test.zero_shot + 1.17 * cache.logits(task.test)
    assert authors.error(fused, theirs["F/test_logits_last_epoch"]) < CLOSE


def test_similar_caches_are_cafos(task):
    theirs = authors.outputs("cafo_fusion")
    bias = predictors.SimilarCaches().fit(task).logits(task.test)
    assert authors.error(task.test.zero_shot + 1.3 * bias, theirs["mean/final_logits"]) < CLOSE
    sharpnesses = [0.1 + i * (12 - 0.1) / 12 for i in range(12)]
    betas = [0.1 + i * (5 - 0.1) / 10 for i in range(10)]
    grid = [
        fusion.accuracy_over_beta(fusion.additive, task.val.zero_shot, bias, task.val.y, betas)
        for bias in predictors.SimilarCaches().fit(task).logits_grid(task.val, [{"sharpness": s} for s in sharpnesses])
    ]
    assert authors.error(100 * torch.tensor(grid), theirs["search_val_acc_grid"]) < 1e-6


def test_gda_agrees(task):
    theirs = authors.outputs("gda")
    gda = predictors.GDA().fit(task)
    assert authors.error(gda.weight_.T, theirs["W"]) < CLOSE
    assert authors.error(gda.intercept_, theirs["b"]) < CLOSE
    bias = gda.logits(task.test)
    for beta in theirs["alpha_grid"].tolist():
        name = f"test_logits_alpha/{beta:g}"
        assert authors.error(task.test.zero_shot + beta * bias, theirs[name]) < CLOSE
    method = methods.build("gda").fit(task)
    assert authors.error(method.logits(task.test), theirs["test_logits"]) < CLOSE


@pytest.mark.parametrize(("key", "sharpness", "penalty"), [("fixed0", 1.0, 0.05), ("fixed1", 3.0, 1.0)])
def test_proker_agrees(task, key, sharpness, penalty):
    theirs = authors.outputs("proker")
    proker = predictors.ProKeR(sharpness=sharpness, penalty=penalty).fit(task)
    assert authors.error(proker.coefficients_ / 100, theirs[f"{key}/alpha_i"]) < CLOSE
    assert authors.error((task.test.zero_shot + proker.logits(task.test)) / 100, theirs[f"{key}/test_logits"]) < CLOSE


def test_grid_of_proker_agrees_in_every_cell(task):
    theirs = authors.outputs("proker")
    settings = [
        {"sharpness": sharpness, "penalty": penalty}
        for sharpness in theirs["search/beta_grid"].tolist()
        for penalty in theirs["search/lmbda_grid"].tolist()
    ]
    fitted = predictors.ProKeR.fit_many(task, settings)
    found = [metrics.accuracy(task.val.zero_shot + p.logits(task.val), task.val.y) for p in fitted]
    assert authors.error(100 * torch.tensor(found), theirs["search/val_acc_grid"].flatten()) < 1e-6


def test_ape_agrees(task):
    theirs = authors.outputs("ape")
    ape = predictors.APE(channels=22 / 32).fit(task)
    assert authors.error(ape.criterion(task), theirs["criterion"]) < CLOSE
    assert ape.channels_.tolist() == theirs["indices"].tolist()
    assert authors.error(ape.divergence_.flatten(), theirs["cache_div"]) < CLOSE
    assert authors.error(task.test.zero_shot + ape.logits(task.test), theirs["logits_init_test"]) < CLOSE
    best = next(ape.logits_grid(task.test, [{"sharpness": 6.1375, "gamma": 0.6}]))
    assert authors.error(task.test.zero_shot + 5.0285714 * best, theirs["logits_searched_test"]) < CLOSE


def test_grid_of_ape_agrees_in_every_cell(task):
    settings = [{"sharpness": 0.1 + i * 6.9 / 8, "gamma": j / 5} for i in range(8) for j in range(5)]
    betas = [0.1 + i * 6.9 / 7 for i in range(7)]
    grid = [
        fusion.accuracy_over_beta(fusion.additive, task.val.zero_shot, votes, task.val.y, betas)
        for votes in predictors.APE(channels=22 / 32).fit(task).logits_grid(task.val, settings)
    ]
    ours = 100 * torch.tensor(grid).view(8, 5, 7).transpose(1, 2)
    assert authors.error(ours, authors.outputs("ape")["val_acc_grid"]) < 1e-6


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
