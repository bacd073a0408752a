"""Every published method: it builds by name, keeps the protocol, and beta = 0 gives zero-shot CLIP back."""

import inspect
from dataclasses import replace

import pytest
import torch

from lib import fusion, methods, metrics

BRIEF = {
    "aux_only": {"epochs": 3},
    "amu": {"epochs": 3},
    "amu_code": {"epochs": 3},
    "tip_adapter_f": {"epochs": 2},
    "clip_adapter": {"epochs": 3},
    "taskres": {"epochs": 3},
    "text_probe": {"epochs": 3},
    "clap": {"epochs": 3},
    "cross_modal": {"iterations": 30},
    "lp_plus_plus": {"iterations": 25},
}
NAMES = list(methods.METHODS)
WITH_BETA = [name for name in NAMES if "beta" in inspect.signature(methods.METHODS[name].fusion).parameters]


def build(name, protocol="val", **settings):
    return methods.build(name, protocol, **BRIEF.get(name, {}), **settings)


@pytest.mark.parametrize("protocol", ["val", "fixed", "oracle"])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_fits_and_classifies(name, protocol, make_task):
    task = make_task()
    method = build(name, protocol).fit(task)
    logits = method.logits(task.test)
    assert logits.shape == (40, 5)
    assert torch.isfinite(logits).all()
    assert torch.equal(build(name, protocol).fit(task).logits(task.test), logits)
    entry = methods.METHODS[name]
    open_ = set(entry.refit) | set(entry.grid) if protocol != "fixed" else set()
    assert set(method.chosen_) == open_
    for key, value in method.chosen_.items():
        assert value in (entry.refit | entry.grid)[key]
    assert (method.val_accuracy_ is None) == (not open_)


@pytest.mark.parametrize("name", NAMES)
def test_published_constants_stand_first(name):
    entry = methods.METHODS[name]
    for key, options in (entry.refit | entry.grid).items():
        assert options[0] == entry.arguments()[key]


@pytest.mark.parametrize("name", WITH_BETA)
def test_beta_zero_gives_zero_shot_back(name, make_task):
    task = make_task()
    fused = build(name, beta=0.0).fit(task).logits(task.test)
    assert torch.allclose(fused, task.test.zero_shot)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_is_not_chosen(name, make_task):
    entry = methods.METHODS[name]
    held = {key: options[-1] for key, options in (entry.refit | entry.grid).items()}
    method = build(name, **held).fit(make_task())
    assert method.chosen_ == {}
    assert all(method.settings_[key] == value for key, value in held.items())
    assert all(vars(method.predictor_)[key] == value for key, value in held.items() if key in vars(method.predictor_))


@pytest.mark.parametrize("name", NAMES)
def test_the_choice_is_the_plain_search(name, make_task):
    """Every setting fitted and judged on its own: the first best must be the one chosen."""
    task = make_task()
    entry = methods.METHODS[name]
    short = {key: tuple(options[:4]) for key, options in entry.refit.items()}
    grid = {key: tuple(options[:6:2]) + tuple(options[-2:]) for key, options in entry.grid.items()}
    entry = replace(entry, refit=short, grid=grid)
    method = methods.Method(name, entry, "val", BRIEF.get(name, {})).fit(task)
    best, chosen = -1.0, {}
    for refit in methods._settings(short):
        for setting in methods._settings(grid):
            plain = methods.Method(name, entry, "val", BRIEF.get(name, {}) | refit | setting).fit(task)
            accuracy = metrics.accuracy(plain.logits(task.val), task.val.y)
            if accuracy > best:
                best, chosen = accuracy, refit | setting
    assert method.chosen_ == chosen
    if chosen:
        assert method.val_accuracy_ == best


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_the_test_part_matter_to_the_oracle_only(name, make_task):
    task = make_task()
    shuffled = replace(task, test=replace(task.test, y=task.test.y.flip(0)))
    for protocol in ("val", "fixed"):
        one, other = (build(name, protocol).fit(t).logits(task.test) for t in (task, shuffled))
        assert torch.equal(one, other)


def test_triples_are_built_from_any_predictor_and_rule(make_task):
    task = make_task()
    for rule in fusion.FUSIONS:
        method = methods.build(f"gda/{rule}", features="aux").fit(task)
        assert torch.isfinite(method.logits(task.test)).all()
    for name in methods.PREDICTORS:
        brief = {"epochs": 2} if "epochs" in inspect.signature(methods.PREDICTORS[name]).parameters else {}
        brief |= {"iterations": 20} if "iterations" in inspect.signature(methods.PREDICTORS[name]).parameters else {}
        assert methods.build(f"{name}/uncertain", **brief).fit(task).logits(task.test).shape == (40, 5)


def test_learned_beta_comes_from_the_validation_images(make_task):
    task = make_task()
    method = methods.build("gda/learned", features="aux").fit(task)
    bias = method.bias(task.val)
    assert method.chosen_ == {"beta": fusion.learn_beta(task.val.zero_shot, bias, task.val.y)}
    assert methods.build("gda/learned", "fixed").fit(task).chosen_ == {}
    assert methods.build("gda/learned", beta=0.3).fit(task).chosen_ == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("amuu",), r"no method 'amuu'; did you mean 'amu'\?.*zero_shot"),
        (("amu", "test"), "val, fixed, oracle, not 'test'"),
        (("amu", "val", {"betta": 1.0}), r"amu has no hyper-parameter 'betta'; did you mean 'beta'\?"),
        (("gdaa/fixed",), r"no predictor 'gdaa'; did you mean 'gda'\?"),
        (("gda/fix",), r"no fusion 'fix'; did you mean 'fixed'\?"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_known(arguments, words):
    name, *rest = arguments
    settings = rest.pop() if rest and isinstance(rest[-1], dict) else {}
    with pytest.raises(ValueError, match=words):
        methods.build(name, *rest, **settings)


def test_choosing_without_validation_images_is_refused(make_task):
    with pytest.raises(ValueError, match="gda has to choose, but arrays has no validation images"):
        methods.build("gda").fit(replace(make_task(), val=None))


def test_a_method_says_what_it_is():
    assert repr(methods.build("gda", "fixed", beta=0.5)) == "GDA [fixed](beta=0.5)"
