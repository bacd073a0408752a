"""Caches and kernel regression against the authors' own code and, for classes with unequal support, their formulas."""

from dataclasses import replace

import authors
import pytest
import torch

from lib import fusion, methods, metrics, predictors
from lib.predictors import caches

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
        post_grid={"sharpness": theirs["beta_list"].tolist(), "beta": theirs["alpha_list"].tolist()},
    )
    method = methods.Method("tip_adapter", entry, "val", {}).fit(task)
    first = methods.Method("tip_adapter", entry, "fixed", {"sharpness": 1.825, "beta": 2.565}).fit(task)
    equal = metrics.accuracy(first.logits(task.val), task.val.y)
    assert method.val_accuracy_ == pytest.approx(equal), "theirs is the first of equals, ours the middle one"
    assert 100 * equal == pytest.approx(theirs["val_acc_grid"].max().item(), abs=1e-4)
    assert authors.error(first.logits(task.test), theirs["tip_logits_test_best"]) < CLOSE


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


# ---- classes with unequal support ---------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[3, 3, 3], [1, 4, 2], [9, 0, 1]])
def test_class_sums_are_a_product_with_one_hot_labels(counts):
    values = torch.rand(7, sum(counts), generator=torch.Generator().manual_seed(0))
    labels = torch.nn.functional.one_hot(torch.arange(3).repeat_interleave(torch.tensor(counts)), 3).float()
    assert torch.allclose(caches.class_sums(values, torch.tensor(counts)), values @ labels, atol=1e-5)
    assert caches.class_sums(values[:0], torch.tensor(counts)).shape == (0, 3)


def test_cache_logits_of_unequal_classes_follow_the_formula(task):
    few = authors.unequal(task)
    labels = torch.nn.functional.one_hot(few.support.y, few.num_classes).float()
    expected = torch.exp(-2 * (1 - task.test.clip @ few.support.clip.T)) @ labels
    cache = predictors.Cache(sharpness=2.0).fit(few)
    assert authors.error(cache.logits(task.test), expected) < 1e-6
    grid = [{"sharpness": s} for s in [*torch.linspace(0.1, 7, 60).tolist(), 2.0]]
    assert authors.error(list(cache.logits_grid(task.test, grid))[-1], expected) < 1e-5


def test_images_twice_in_the_cache_count_twice(task):
    twice = torch.cat([torch.arange(len(task.support)), (task.support.y == 4).nonzero()[:, 0]])
    doubled = predictors.Cache().fit(replace(task, support=task.support.rows(twice))).logits(task.test)
    factor = torch.ones(task.num_classes)
    factor[4] = 2
    assert authors.error(doubled, predictors.Cache().fit(task).logits(task.test) * factor) < 1e-6


def test_criterion_of_ape_is_the_mean_over_all_pairs_of_two_classes(task):
    few = authors.unequal(task)
    x = torch.cat([few.text, few.support.clip]).double()
    y = torch.cat([torch.arange(few.num_classes), few.support.y])
    pairs = [(i, j) for i in range(len(y)) for j in range(len(y)) if y[i] != y[j]]
    products = torch.stack([x[i] * x[j] for i, j in pairs]).mean(0)
    expected = 0.5 * few.text.var(0) - 0.5 * products
    assert authors.error(predictors.APE().criterion(few).double(), expected) < CLOSE


def test_ape_weighs_each_image_of_unequal_classes_by_its_own_divergence(task):
    few = authors.unequal(task)
    ape = predictors.APE(sharpness=3.0, gamma=0.4, channels=0.5).fit(few)

    def unit(x):
        return torch.nn.functional.normalize(x[:, ape.channels_], dim=1)

    keys, y = unit(few.support.clip), few.support.y
    p = (keys @ unit(few.text).T).softmax(1)
    weights = torch.stack([p[i, c] ** (-0.4 / torch.tensor(2.0).log()) for i, c in enumerate(y.tolist())])
    kernel = torch.exp(-3 * (1 - unit(task.test.clip) @ keys.T)) * weights
    expected = torch.stack([kernel[:, y == c].sum(1) for c in range(few.num_classes)], dim=1)
    assert authors.error(ape.logits(task.test), expected) < CLOSE
    assert authors.error(next(ape.logits_grid(task.test, [{}])), expected) < CLOSE


def test_proker_of_unequal_classes_solves_its_system(task):
    few = authors.unequal(task)
    x, labels = few.support.clip.double(), torch.nn.functional.one_hot(few.support.y, few.num_classes)
    gram = torch.exp(-2 * (1 - x @ x.T))
    dual = torch.linalg.solve(gram / 0.3 + torch.eye(len(x)), (labels - few.support.zero_shot / 100).double())
    expected = 100 * torch.exp(-2 * (1 - task.test.clip.double() @ x.T)) @ dual
    for proker in predictors.ProKeR.fit_many(few, [{"sharpness": 2.0, "penalty": p} for p in (0.3, 0.3)]):
        assert authors.error(proker.logits(task.test), expected) < CLOSE


@pytest.mark.parametrize("predictor", [predictors.TrainedCache(epochs=3), predictors.SimilarCaches()])
def test_other_caches_take_unequal_classes_in_any_order(task, predictor):
    few = authors.unequal(task)
    by_class = replace(few, support=few.support.rows(torch.argsort(few.support.y)))
    logits = predictor.fit(few).logits(task.test)
    assert torch.isfinite(logits).all()
    assert authors.error(predictor.fit(by_class).logits(task.test), logits) < CLOSE


# ---- what predictors say of themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Cache", "TrainedCache", "SimilarCaches", "APE", "ProKeR"])
def test_needs_text_says_whether_texts_matter(task, name):
    """TrainedCache's `zero_shot` acts in its loss, SimilarCaches' in its weights."""
    predictor = getattr(predictors, name)()
    logits = predictor.fit(task).logits(task.test)
    parts = {p: replace(getattr(task, p), zero_shot=getattr(task, p).zero_shot.flip(1)) for p in ("support", "test")}
    other = replace(task, text=task.text.flip(0), **parts)
    assert torch.equal(predictor.fit(other).logits(other.test), logits) != predictor.needs_text


@pytest.mark.parametrize("name", ["Cache", "SimilarCaches", "APE"])
def test_a_grid_leaves_hyper_parameters_alone(task, name):
    predictor = getattr(predictors, name)().fit(task)
    logits = predictor.logits(task.test)
    grid = predictor.logits_grid(task.test, [{"sharpness": 5.0}, {}])
    next(grid)
    assert torch.equal(predictor.logits(task.test), logits)
    assert authors.error(next(grid), logits) < 1e-6


@pytest.mark.parametrize("predictor", [predictors.Cache(), predictors.APE(), predictors.ProKeR()])
def test_chunks_change_nothing(task, predictor, monkeypatch):
    logits = predictor.fit(task).logits(task.test)
    monkeypatch.setattr(caches, "CHUNK", 7)  # ProKeR: also single precision and one buffer
    assert authors.error(predictor.fit(task).logits(task.test), logits) < CLOSE


def test_unknown_starts_of_a_trained_cache_are_refused(task):
    with pytest.raises(ValueError, match="features or random, not 'warm'"):
        predictors.TrainedCache(init="warm").fit(task)


@pytest.mark.parametrize("sharpness", [0.0, 5.5])
def test_static_memory_is_a_prototype_for_each_image_and_class(task, sharpness, monkeypatch):
    few = authors.unequal(task)
    expected = torch.zeros(len(few.test), 12)
    for c in range(12):
        memory = torch.cat([few.text[c, None], few.support.clip[few.support.y == c]])
        for i, x in enumerate(few.test.clip):
            prototype = sum(torch.exp(-sharpness * (1 - x @ m)) * m for m in memory)
            expected[i, c] = 100 * x @ prototype / prototype.norm()
    memory = predictors.StaticMemory(sharpness=sharpness).fit(few)
    assert authors.error(memory.logits(few.test), expected) < 1e-5
    monkeypatch.setattr(caches, "CHUNK", 7)
    assert authors.error(memory.logits(few.test), expected) < 1e-5
