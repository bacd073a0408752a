"""What every predictor promises, whatever it computes."""

from dataclasses import fields, replace

import pytest
import torch

from lib import methods, predictors
from lib.tasks import FewShotTask, Split

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
NEED_TEXT = {"ape", "clip_adapter", "taskres", "text_probe", "cross_modal"}
WHOLE_SPLIT = {"m_adapter", "transclip"}


def build(name, **settings):
    return methods.PREDICTORS[name](**BRIEF.get(name, {}), **settings)


def tensors(task):
    parts = [task.text, *(getattr(part, f.name) for part in (task.support, task.val, task.test) for f in fields(Split))]
    return [part.clone() for part in parts]


def close(ours, theirs, tolerance=1e-4):
    return ((ours - theirs).abs().max() / (theirs.max() - theirs.min())).item() < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_shapes_determinism_and_inputs(name, make_task):
    task = make_task()
    before = tensors(task)
    predictor = build(name)
    assert predictor.fit(task) is predictor
    logits = predictor.logits(task.test)
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


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WHOLE_SPLIT])
def test_rows_do_not_depend_on_each_other(name, make_task):
    task = make_task()
    predictor = build(name).fit(task)
    some = torch.tensor([30, 2, 17])
    assert close(predictor.logits(task.test.rows(some)), predictor.logits(task.test)[some])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mlp"])  # its random start favours a class order
def test_renaming_the_classes_renames_the_logits(name, make_arrays, monkeypatch):
    arrays = make_arrays()
    order = torch.tensor([3, 0, 4, 1, 2])
    place = torch.argsort(order)
    renamed = {"text": arrays["text"][order]} | {
        part: arrays[part] | {"y": place[arrays[part]["y"]]} for part in ("support", "val", "test")
    }
    task, permuted = FewShotTask.from_arrays(**arrays), FewShotTask.from_arrays(**renamed)
    logits = build(name).fit(task).logits(task.test)
    texts = predictors.CrossModal._text_orders
    follow = staticmethod(lambda task, epochs, generator: place[texts(task, epochs, generator)])
    monkeypatch.setattr(predictors.CrossModal, "_text_orders", follow)  # the same texts at the same steps
    assert close(build(name).fit(permuted).logits(permuted.test), logits[:, order], 1e-3)


@pytest.mark.parametrize("features", ["aux", "clip+aux"])
@pytest.mark.parametrize("name", NAMES)
def test_features_of_any_kind_or_a_reason_why_not(name, features, make_task):
    task = make_task()
    if name in NEED_TEXT:
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
    }
    grid = [*grids.get(name, grids["cache"] if name == "trained_cache" else []), {}]
    predictor = build(name).fit(task)
    for setting, logits in zip(grid, predictor.logits_grid(task.val, grid), strict=True):
        other = build(name).fit(task)
        vars(other).update(setting)
        assert close(logits, other.logits(task.val), 1e-5)


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


def test_one_class_text_more_or_less_is_no_trouble(make_task):
    for classes in (2, 3):
        task = make_task(classes=classes, shots=1, n_val=6, n_test=6)
        for name in NAMES:
            assert torch.isfinite(build(name).fit(task).logits(task.test)).all(), name


@pytest.mark.parametrize("init", ["mean", "zero", "random", "text"])
def test_heads_start_where_they_are_told(init, make_task):
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
        (methods.PREDICTORS["similar_caches"](norm="max"), "linear.*'max'"),
    ],
)
def test_unknown_words_are_refused(predictor, words, make_task):
    task = make_task()
    with pytest.raises(ValueError, match=words):
        predictor.fit(task).logits(task.test)


def test_transclip_without_support_needs_no_shots(make_task):
    task = make_task()
    one = predictors.TransCLIP(use_support=False).fit(task).logits(task.test)
    other = predictors.TransCLIP(use_support=False).fit(make_task(shots=2)).logits(task.test)
    assert torch.equal(one, other)
