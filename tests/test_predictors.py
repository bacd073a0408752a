"""What every predictor promises, whatever it computes."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import authors
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lib import methods, predictors
from lib.predictors import base, training
from lib.splits import Split
from lib.tasks import FewShotTask

BRIEF = {  # enough training to move, not more
    "head": {"epochs": 3},
    "mlp": {"epochs": 3},
    "trained_cache": {"epochs": 2},
    "clip_adapter": {"epochs": 3},
    "taskres": {"epochs": 3},
    "text_probe": {"epochs": 3, "lr": 0.02},
    "cross_modal": {"iterations": 30, "evaluate_every": 10},
    "lp_plus_plus": {"iterations": 25},
}
NAMES = list(methods.PREDICTORS)
CLASSES = methods.PREDICTORS
TEXTLESS = {  # what must work without class texts
    "head": {"lam": 0.0},
    "convex_head": {"lam": 0.0},
    "mlp": {"lam": 0.0},
    "linear_probe": {},
    "gda": {},
    "cache": {},
}


def build(name, **settings):
    return methods.PREDICTORS[name](**BRIEF.get(name, {}) | settings)


def tensors(task):
    parts = [task.text, *(getattr(part, f.name) for part in (task.support, task.val, task.test) for f in fields(Split))]
    return [part.clone() for part in parts if part is not None]


def parameters(predictor):
    return {name: getattr(predictor, name) for name in predictors.hyper_parameters(type(predictor))}


def close(ours, theirs, tolerance=1e-4):
    return ((ours - theirs).abs().max() / (theirs.max() - theirs.min())).item() < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_shapes_determinism_and_inputs(name, make_task):
    task = make_task()
    before = tensors(task)
    predictor = build(name)
    settings = parameters(predictor)
    assert predictor.fit(task) is predictor
    logits = predictor.logits(task.test)
    assert parameters(predictor) == settings
    assert all(key in settings or key.endswith("_") for key in vars(predictor))
    assert logits.shape == (40, 5)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert torch.isfinite(logits).all()
    assert torch.equal(build(name).fit(task).logits(task.test), logits)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(task), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_fit_forgets_the_first(name, make_task):
    one, other = make_task(seed=1), make_task(seed=2, shots=3, classes=6)
    twice = build(name).fit(one).fit(other)
    assert torch.equal(twice.logits(other.test), build(name).fit(other).logits(other.test))


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_a_split_and_the_test_part_are_not_read(name, make_task):
    task = make_task()
    predictor = build(name).fit(replace(task, test=None))
    wrong = replace(task.test, y=(task.test.y + 1) % 5)
    assert torch.equal(predictor.logits(wrong), predictor.logits(task.test))
    without_val = build(name).fit(replace(task, val=None, test=None))
    assert without_val.logits(task.test).shape == (40, 5)


@pytest.mark.parametrize("name", [name for name in NAMES if not CLASSES[name].per_batch])
def test_rows_do_not_depend_on_each_other(name, make_task):
    task = make_task()
    predictor = build(name).fit(task)
    some = torch.tensor([30, 2, 17])
    assert close(predictor.logits(task.test.rows(some)), predictor.logits(task.test)[some])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mlp"])  # its random start favours a class order
def test_renaming_the_classes_renames_the_logits(name, make_arrays):
    arrays = make_arrays()
    order = torch.tensor([3, 0, 4, 1, 2])
    place = torch.argsort(order)
    renamed = {name: arrays[name][order] for name in ("text", "prompts")} | {
        part: arrays[part] | {"y": place[arrays[part]["y"]]} for part in ("support", "val", "test")
    }
    task, permuted = FewShotTask.from_arrays(**arrays), FewShotTask.from_arrays(**renamed)
    texts = training.epoch_orders(5, 30, torch.Generator().manual_seed(0))
    first, second = ({"text_orders": rows} if name == "cross_modal" else {} for rows in (texts, place[texts]))
    logits = build(name).fit(task, **first).logits(task.test)
    assert close(build(name).fit(permuted, **second).logits(permuted.test), logits[:, order], 1e-3)


@pytest.mark.parametrize("features", ["aux", "clip+aux"])
@pytest.mark.parametrize("name", NAMES)
def test_features_of_any_kind_or_a_reason_why_not(name, features, make_task):
    task = make_task()
    if CLASSES[name].clip_only:
        with pytest.raises(ValueError, match=f"class texts.*clip.*'{features}'".replace("+", r"\+")):
            build(name, features=features).fit(task)
        return
    logits = build(name, features=features).fit(task).logits(task.test)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", NAMES)
def test_features_of_an_unknown_kind_are_refused(name, make_task):
    with pytest.raises(ValueError, match="depth"):
        build(name, features="depth").fit(make_task())


@pytest.mark.parametrize("name", NAMES)
def test_fitting_many_is_fitting_each(name, make_task):
    task = make_task()
    settings = [BRIEF.get(name, {}) | {"features": "clip"}, BRIEF.get(name, {})]
    together = methods.PREDICTORS[name].fit_many(task, settings)
    for predictor, setting in zip(together, settings, strict=True):
        alone = methods.PREDICTORS[name](**setting).fit(task)
        assert close(predictor.logits(task.test), alone.logits(task.test), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_is_the_loop_over_it(name, make_task):
    task = make_task()
    grids = {
        "cache": [{"sharpness": 0.5}, {"sharpness": 4.0}],
        "similar_caches": [{"sharpness": 0.5}, {"sharpness": 4.0}],
        "ape": [{"sharpness": 2.0, "gamma": 0.0}, {"sharpness": 2.0, "gamma": 0.7}, {"gamma": 0.3}],
        "m_adapter": [{"delta": 0.0}, {"gamma": 2.0, "sharpness": 1.0}],
        "transclip": [{"gamma": 0.2}, {"gamma": 0.002}],
        "timo": [{"weight": 1.0}, {"weight": 0.0}],
    }
    grid = [*grids.get(name, grids["cache"] if name == "trained_cache" else []), {}]
    predictor = build(name).fit(task)
    for setting, logits in zip(grid, predictor.logits_grid(task.val, grid), strict=True):
        assert close(logits, build(name, **setting).fit(task).logits(task.val), 1e-5)
    assert parameters(predictor) == parameters(build(name))


@pytest.mark.parametrize("name", ["cache", "trained_cache", "similar_caches", "ape"])
def test_a_fine_grid_is_interpolated_to_rounding(name, make_task):
    task = make_task()
    gammas = (0.1, 0.8) if name == "ape" else (None,)
    grid = [
        {"sharpness": sharpness} | ({"gamma": gamma} if gamma else {})
        for sharpness in [1.0, *torch.linspace(0.1, 12, 90).tolist()]
        for gamma in gammas
    ]
    predictor = build(name).fit(task)
    for setting, logits in zip(grid, predictor.logits_grid(task.val, grid), strict=True):
        one = next(predictor.logits_grid(task.val, [setting]))
        assert close(logits, one, 1e-5)
        assert torch.equal(logits.argmax(1), one.argmax(1))


def test_two_classes_and_one_shot_are_enough(make_task):
    for classes in (2, 3):
        task = make_task(classes=classes, shots=1, n_val=6, n_test=6)
        for name in NAMES:
            assert torch.isfinite(build(name).fit(task).logits(task.test)).all(), name


@pytest.mark.parametrize("init", ["mean", "zero", "random", "text"])
def test_heads_start_at_their_initial_weight(init, make_task):
    task = make_task()
    weight = predictors.initial_weight(task, "clip", init)
    assert weight.shape == task.text.shape
    if init == "text":
        assert torch.equal(weight, task.text)
        with pytest.raises(ValueError, match="share a space"):
            predictors.initial_weight(task, "aux", init)
    trained = predictors.MultiBranchHead(features="clip", init=init, epochs=2).fit(task)
    assert not torch.equal(trained.weight_, weight)


def test_views_of_the_support_enter_where_authors_use_them(make_arrays):
    arrays = make_arrays()
    generator = torch.Generator().manual_seed(0)
    views = [
        {
            k: v + 0.2 * torch.randn(v.shape, generator=generator) if k != "y" else v
            for k, v in arrays["support"].items()
        }
        for _ in range(3)
    ]
    plain, augmented = FewShotTask.from_arrays(**arrays), FewShotTask.from_arrays(**arrays, views=views)
    for name in ("cache", "gda", "head"):
        logits = build(name).fit(augmented).logits(plain.test)
        assert not torch.equal(logits, build(name).fit(plain).logits(plain.test))
    assert torch.allclose(build("cache").fit(augmented).keys_.norm(dim=1), torch.ones(20))


@pytest.mark.parametrize(
    ("predictor", "words"),
    [
        (predictors.MultiBranchHead(init="warm"), "mean, zero, random, text, not 'warm'"),
        (methods.PREDICTORS["trained_cache"](init="warm"), "features or random, not 'warm'"),
        (predictors.TextProbe(constraint="l1"), "l2-balanced.*'l1'"),
    ],
)
def test_unknown_words_are_refused(predictor, words, make_task):
    task = make_task()
    with pytest.raises(ValueError, match=words):
        predictor.fit(task).logits(task.test)


@pytest.fixture
def uneven(make_arrays):
    """Return a task whose five classes have 4, 4, 3, 2 and 1 support images, not class by class."""
    arrays = make_arrays()
    keep = torch.tensor([16, 0, 5, 1, 2, 6, 3, 7, 9, 8, 12, 4, 10, 14])
    return FewShotTask.from_arrays(
        **arrays | {"support": {key: value[keep] for key, value in arrays["support"].items()}}
    )


@pytest.mark.parametrize("name", NAMES)
def test_classes_may_differ_in_images(name, uneven):
    assert torch.isfinite(build(name).fit(uneven).logits(uneven.test)).all()


def test_a_formula_for_equal_classes_names_those_that_differ(uneven, make_task):
    @dataclass(eq=False)
    class Equal(predictors.NoPredictor):
        equal_shots: ClassVar[bool] = True

    Equal().check(make_task())
    with pytest.raises(ValueError, match=r"Equal needs the same number.*'class 4' has 1 and 'class 0' has 4"):
        Equal().check(uneven)


def test_uneven_classes_are_weighed_by_the_formulas(uneven):
    support = uneven.support
    means = torch.stack([support.aux[support.y == c].mean(0) for c in range(5)])
    assert torch.allclose(predictors.initial_weight(uneven, "aux", "mean"), means, atol=1e-6)
    centred = torch.cat([support.aux[support.y == c] - means[c] for c in range(5)]).double()
    scatter = centred.T @ centred
    precision = 16 * torch.linalg.inv(scatter + scatter.trace() / 13 * torch.eye(16, dtype=scatter.dtype))
    assert close(predictors.GDA("aux").fit(uneven).weight_, (means.double() @ precision).float())
    theirs = LogisticRegression(tol=1e-8, max_iter=5000).fit(support.aux.double().numpy(), support.y.numpy())
    ours = predictors.LinearProbe("aux", 1.0).fit(uneven)
    assert close(ours.weight_, torch.from_numpy(theirs.coef_).float())
    head = predictors.ConvexHead(beta=2.0, tolerance=1e-6).fit(uneven)
    weight = head.weight_.clone().requires_grad_()
    bias, fused = (torch.nn.functional.cross_entropy(v, support.y) for v in head.branches(support, weight))
    ((bias + fused) / 2 + head.penalty / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_without_texts_a_predictor_fits_or_says_that_it_needs_them(name, make_arrays):
    task = FewShotTask.from_arrays(**make_arrays() | {"text": None, "prompts": None}, num_classes=5)
    predictor = build(name, **TEXTLESS.get(name, {}) or ({"features": "clip"} if CLASSES[name].clip_only else {}))
    assert predictor.uses_text() == (name not in TEXTLESS)
    if predictor.uses_text():
        with pytest.raises(ValueError, match=f"{type(predictor).__name__} needs class texts, but arrays has no text"):
            predictor.fit(task)
    else:
        assert torch.isfinite(predictor.fit(task).logits(task.test)).all()


@pytest.mark.parametrize("name", ["head", "convex_head", "mlp"])
def test_a_fused_branch_needs_texts(name, make_arrays):
    task = FewShotTask.from_arrays(**make_arrays() | {"text": None, "prompts": None}, num_classes=5)
    for fit in (lambda: build(name).fit(task), lambda: CLASSES[name].fit_many(task, [{"lam": 0.0}, {"lam": 0.3}])):
        with pytest.raises(ValueError, match="needs class texts"):
            fit()
    with pytest.raises(ValueError, match="init 'text' needs class texts"):
        predictors.initial_weight(task, "clip", "text")


def test_a_head_keeps_the_beta_of_its_loss(make_task):
    task = make_task()
    heads = [predictors.MultiBranchHead(epochs=2, beta=beta).fit(task) for beta in (0.5, 8.0)]
    weight = heads[0].weight_
    for head in heads:
        u = predictors.heads.fusion.uncertainty(task.test.zero_shot)
        bias, fused = head.branches(task.test, weight)
        assert torch.allclose(fused, task.test.zero_shot + head.beta * u[:, None] * bias, atol=1e-5)


def test_groups_differ_in_what_varies_alone():
    settings = [{"lam": 0.1}, {"lam": 0.2}, {"epochs": 3}, {"lam": 0.3, "beta": 2.0}, {"epochs": 3, "lam": 0.4}]
    heads = [predictors.MultiBranchHead(**setting) for setting in settings]
    groups = base.group_settings(heads, ("lam", "beta"))
    assert groups == [[heads[0], heads[1], heads[3]], [heads[2], heads[4]]]


def test_a_copy_with_other_parameters_shares_the_fit(make_task):
    task = make_task()
    cache = build("cache", sharpness=2.0).fit(task)
    other = cache.with_params(sharpness=3.0)
    assert (cache.sharpness, other.sharpness) == (2.0, 3.0)
    assert other.keys_ is cache.keys_


def test_gda_is_the_authors_code():
    task, theirs = authors.task(), authors.outputs("gda")
    gda = predictors.GDA().fit(task)
    assert authors.error(gda.weight_.T, theirs["W"]) < 1e-4
    assert authors.error(gda.intercept_, theirs["b"]) < 1e-4
    bias = gda.logits(task.test)
    for beta in theirs["alpha_grid"].tolist():
        fused = task.test.zero_shot + beta * bias
        assert authors.error(fused, theirs[f"test_logits_alpha/{beta:g}"]) < 1e-4
    method = methods.build("gda").fit(task)
    assert authors.error(method.logits(task.test), theirs["test_logits"]) < 1e-4
