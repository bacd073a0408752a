"""Every published method: it builds by name, keeps the protocol, and beta = 0 gives zero-shot CLIP back."""

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch

from lib import fusion, methods, metrics, predictors

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
WITH_BETA = [name for name in NAMES if "beta" in methods.METHODS[name].fusion.defaults]


def without_text(task):
    """The task of a bank without text features."""
    bare = copy.copy(task)
    object.__setattr__(bare, "text", None)
    return bare


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
    open_ = set(entry.fit_grid) | set(entry.post_grid) if protocol != "fixed" else set()
    assert set(method.chosen_) == open_
    for key, value in method.chosen_.items():
        assert value in (entry.fit_grid | entry.post_grid)[key]
    assert (method.val_accuracy_ is None) == (not open_)


@pytest.mark.parametrize("name", NAMES)
def test_grids_ascend_and_hold_the_published_constant(name, make_task):
    entry = methods.METHODS[name]
    for key, options in (entry.fit_grid | entry.post_grid).items():
        assert entry.arguments()[key] in options
        assert list(options) == sorted(set(options))
    method = build(name, "fixed").fit(make_task())
    published = {key: entry.arguments()[key] for key in entry.fit_grid | entry.post_grid}
    assert published.items() <= method.settings_.items()


@pytest.mark.parametrize("name", WITH_BETA)
def test_beta_zero_gives_zero_shot_back(name, make_task):
    task = make_task()
    fused = build(name, beta=0.0).fit(task).logits(task.test)
    assert torch.allclose(fused, task.test.zero_shot)


@pytest.mark.parametrize("name", NAMES)
def test_fixed_hyper_parameters_are_not_chosen(name, make_task):
    entry = methods.METHODS[name]
    fixed = {key: options[-1] for key, options in (entry.fit_grid | entry.post_grid).items()}
    method = build(name, **fixed).fit(make_task())
    assert method.chosen_ == {}
    assert all(method.settings_[key] == value for key, value in fixed.items())
    assert all(vars(method.predictor_)[key] == value for key, value in fixed.items() if key in vars(method.predictor_))


@pytest.mark.parametrize("name", NAMES)
def test_the_choice_is_the_plain_search(name, make_task):
    """Every setting fitted and evaluated on its own: the middle one of the best must be the one chosen."""
    task = make_task()
    entry = methods.METHODS[name]
    fit_grid = {key: tuple(options[:4]) for key, options in entry.fit_grid.items()}
    post_grid = {key: tuple(options[:6:2]) + tuple(options[-2:]) for key, options in entry.post_grid.items()}
    entry = replace(entry, fit_grid=fit_grid, post_grid=post_grid)
    method = methods.Method(name, entry, "val", BRIEF.get(name, {})).fit(task)
    settings, accuracies = methods._settings(fit_grid | post_grid), []
    for setting in settings:
        plain = methods.Method(name, entry, "val", BRIEF.get(name, {}) | setting).fit(task)
        accuracies.append(metrics.accuracy(plain.logits(task.val), task.val.y))
    best = [i for i, accuracy in enumerate(accuracies) if accuracy == max(accuracies)]
    assert method.chosen_ == settings[best[(len(best) - 1) // 2]]
    if method.chosen_:
        assert metrics.accuracy(method.logits(task.val), task.val.y) == method.val_accuracy_ == max(accuracies)


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_the_test_part_matter_to_the_oracle_only(name, make_task):
    task = make_task()
    shuffled = replace(task, test=replace(task.test, y=task.test.y.flip(0)))
    for protocol in ("val", "fixed"):
        one, other = (build(name, protocol).fit(t).logits(task.test) for t in (task, shuffled))
        assert torch.equal(one, other)


def test_triples_are_built_from_any_predictor_and_rule(make_task):
    task = make_task()
    for rule in fusion.ALL:
        method = methods.build(f"gda/{rule}", features="aux").fit(task)
        assert torch.isfinite(method.logits(task.test)).all()
    for name in methods.PREDICTORS:
        names = methods.build(f"{name}/uncertain").entry.arguments()
        brief = {key: value for key, value in {"epochs": 2, "iterations": 20}.items() if key in names}
        assert methods.build(f"{name}/uncertain", **brief).fit(task).logits(task.test).shape == (40, 5)


def test_a_beta_chosen_after_the_fit_leaves_the_loss_of_a_head_alone(make_task):
    task = make_task()
    method = methods.build("head/additive", epochs=3).fit(task)
    head = predictors.MultiBranchHead(epochs=3).fit(task)
    assert method.chosen_["beta"] != head.beta == method.predictor_.beta == 1.0
    assert torch.equal(method.predictor_.weight_, head.weight_)
    for ours, plain in zip(
        method.predictor_.branches(task.test, head.weight_), head.branches(task.test, head.weight_), strict=True
    ):
        assert torch.equal(ours, plain)
    bias = head.logits(task.test)
    assert torch.equal(method.logits(task.test), task.test.zero_shot + method.chosen_["beta"] * bias)


def test_a_name_of_predictor_and_fusion_goes_to_both(make_task):
    task = make_task()
    fixed = methods.build("head/uncertain", beta=3.0, confidence="max", rho=1.0, epochs=2).fit(task)
    tuned = build("amu").fit(task)
    for method in (fixed, tuned):
        assert method.predictor_.beta == method.settings_["beta"]
        assert torch.equal(
            method.predictor_.branches(task.test, method.predictor_.weight_)[1], method.logits(task.test)
        )
    assert (fixed.predictor_.confidence, fixed.predictor_.rho, fixed.chosen_) == ("max", 1.0, {})


def test_defaults_that_differ_stay_each_ones_own(make_task):
    task = make_task()
    method = methods.build("head/wise", "fixed", epochs=2).fit(task)
    assert method.predictor_.beta == 1.0 and method.settings_["beta"] == 0.5
    assert torch.allclose(method.logits(task.test), (task.test.zero_shot + method.bias(task.test)) / 2, atol=1e-5)


def test_the_choice_writes_to_no_fitted_predictor(make_task):
    task = make_task()
    written = []

    class Watched(predictors.Cache):
        def __setattr__(self, name, value):
            if hasattr(self, "keys_"):
                written.append(name)
            super().__setattr__(name, value)

    entry = replace(methods.METHODS["tip_adapter"], predictor=Watched)
    method = methods.Method("watched", entry, "val", {}).fit(task)
    assert method.predictor_.sharpness == method.chosen_["sharpness"] != 1.0
    assert set(written) <= {"labels_", "num_classes_"}


def test_choose_takes_the_middle_of_all_equal_settings(make_task):
    val = make_task().val
    flat = torch.zeros_like(val.zero_shot)
    perfect = 1e3 * torch.nn.functional.one_hot(val.y, 5).float()
    candidates = [(fusion.additive, flat), (fusion.additive, perfect), (fusion.additive, perfect)]
    assert methods.choose(candidates, val, (0.0, 1.0, 2.0)) == (1, 2.0, 1.0)  # of (1, 1), (1, 2), (2, 1), (2, 2)
    assert methods.choose(candidates, val) == (1, None, 1.0)
    nameless = replace(val, y=torch.full_like(val.y, -1))
    with pytest.raises(ValueError, match="20 images of which none has a class"):
        methods.choose(candidates, nameless, (0.0, 1.0))


def test_tables_can_mark_methods_that_depend_on_the_batch():
    assert methods.build("gda/classwise").entry.per_batch and not methods.build("gda/additive").entry.per_batch
    marked = {name for name, entry in methods.METHODS.items() if entry.per_batch}
    assert marked == {"m_adapter", "transclip", "frolic_prior", "stat_a", "zlap", "tda"}


def test_a_method_is_added_by_one_class_and_one_entry(make_task, monkeypatch):
    """The example of the README, as it stands there."""

    @dataclass(eq=False)
    class NearestMean(predictors.Predictor):
        features: str = "aux"

        def fit(self, task):
            self.means_ = torch.nn.functional.normalize(predictors.initial_weight(task, self.features, "mean"), dim=1)
            return self

        def logits(self, split):
            return split.features(self.features) @ self.means_.T

    entry = methods.Entry("Nearest mean", NearestMean, fusion.additive, "ours", post_grid={"beta": (1.0, 5.0, 20.0)})
    monkeypatch.setitem(methods.METHODS, "nearest_mean", entry)
    task = make_task()
    method = methods.build("nearest_mean").fit(task)
    assert method.chosen_["beta"] in (1.0, 5.0, 20.0) and method.settings_["features"] == "aux"
    bias = task.test.aux @ method.predictor_.means_.T
    assert torch.equal(method.logits(task.test), task.test.zero_shot + method.chosen_["beta"] * bias)
    assert methods.compare([task], {"ours": ("nearest_mean", {"features": "clip"})})["accuracy"][0] > 0.2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("amuu",), r"no method 'amuu'; did you mean 'amu'\?.*zero_shot"),
        (("amu", "test"), "val, fixed, oracle, not 'test'"),
        (("amu", "val", {"betta": 1.0}), r"amu has no hyper-parameter 'betta'; did you mean 'beta'\?"),
        (("gdaa/additive",), r"no predictor 'gdaa'; did you mean 'gda'\?"),
        (("gda/aditive",), r"no fusion 'aditive'; did you mean 'additive'\?"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_known(arguments, words):
    name, *rest = arguments
    settings = rest.pop() if rest and isinstance(rest[-1], dict) else {}
    with pytest.raises(ValueError, match=words):
        methods.build(name, *rest, **settings)


@pytest.mark.parametrize("images", [None, 0])
def test_choosing_without_validation_images_is_refused(images, make_task):
    task = make_task()
    task = replace(task, val=None if images is None else task.val.rows(torch.arange(0)))
    words = (
        "tip_adapter chooses sharpness, beta on validation images, but arrays has none; take protocol='fixed' or add"
    )
    with pytest.raises(ValueError, match=words):
        methods.build("tip_adapter").fit(task)
    logits = methods.build("tip_adapter", "fixed").fit(task).logits(task.test)
    assert torch.equal(methods.build("tip_adapter", sharpness=1.0, beta=1.17).fit(task).logits(task.test), logits)


def test_without_text_only_methods_that_need_none_are_offered(make_task):
    task = make_task()
    bare = without_text(task)
    assert methods.offered(task) == NAMES
    offered = methods.offered(bare)
    assert "linear_probe" in offered and not {"zero_shot", "gda", "tip_adapter", "amu"} & set(offered)
    with pytest.raises(
        ValueError, match="gda: fusion 'additive' needs zero-shot logits, but arrays has no text features"
    ):
        methods.build("gda").fit(bare)


def test_compare_counts_test_images_of_the_tasks_classes_only(make_task):
    task = make_task()
    y = task.test.y.where(task.test.y < 4, -1)
    results = methods.compare([replace(task, test=replace(task.test, y=y))], {"GDA": ("gda", {"beta": 1.0})})
    logits = results["method"][0].logits(task.test)[y >= 0]
    assert len(results["correct"][0]) == int((y >= 0).sum()) == 32
    assert results["accuracy"][0] == metrics.accuracy(logits, y[y >= 0])
    assert torch.equal(results["correct"][0], metrics.correct(logits, y[y >= 0]))


@pytest.mark.parametrize("classes", [None, torch.tensor([], dtype=torch.int64), torch.tensor([1, 3])])
def test_accuracy_is_nan_on_a_test_set_without_a_class_of_the_task(classes, make_task):
    task = make_task()
    test = replace(task.test, y=torch.full_like(task.test.y, -1), classes=classes)
    contestants = {"GDA": ("gda", {}), "AMU": ("amu", BRIEF["amu"]), "no fusion": ("linear_probe", {})}
    results = methods.compare([replace(task, test=test)], contestants)
    assert results["accuracy"].isna().all() and set(map(len, results["correct"])) == {0}
    table = methods.compare_fusions(
        fusion.FUSIONS, task.val, task.val.zero_shot, test, test.zero_shot, methods.ANY_BETA[::6]
    )
    assert table["accuracy"].isna().all() and table["val"].notna().all()


def compare_rules(task, rules, betas, test_y=None, **options):
    biases = [split.aux @ split.aux.new_ones(task.support.aux.shape[1], 5).cumsum(1) for split in (task.val, task.test)]
    test = task.test if test_y is None else replace(task.test, y=test_y)
    return methods.compare_fusions(rules, task.val, biases[0], test, biases[1], betas, **options), biases


def test_fusions_take_beta_from_the_validation_images_alone(make_task):
    task = make_task(n_val=40, n_test=80)
    rules, betas = (
        {name: fusion.FUSIONS[name] for name in ("additive", "wise", "classwise", "replace")},
        (1.0, 0.0, 0.5),
    )
    table, (val_bias, test_bias) = compare_rules(task, rules, betas)
    assert list(table.index) == list(rules) and math.isnan(table["beta"]["replace"])
    for name, row in table.drop("replace").iterrows():
        at_val, at_test = (
            metrics.accuracy(rules[name](split.zero_shot, bias, beta=row["beta"]), split.y)
            for split, bias in ((task.val, val_bias), (task.test, test_bias))
        )
        assert (row["val"], row["accuracy"]) == (at_val, at_test)
        assert at_val == max(fusion.accuracy_over_beta(rules[name], task.val.zero_shot, val_bias, task.val.y, betas))
    assert table["accuracy"]["replace"] == metrics.accuracy(test_bias, task.test.y)
    again, _ = compare_rules(task, rules, betas, (task.test.y + 1) % 5)
    assert again["beta"].dropna().tolist() == table["beta"].dropna().tolist()
    flat = methods.compare_fusions(
        {"additive": fusion.additive}, task.val, 0 * val_bias, task.test, test_bias, (1.0, 0.01, 5.0, 0.2, 9.0)
    )
    assert flat["beta"]["additive"] == 1.0, "the middle of equals, in ascending order"


def test_beta_may_be_chosen_by_cross_entropy(make_task):
    task = make_task(n_val=40)
    rules = {name: fusion.FUSIONS[name] for name in ("additive", "uncertain", "classwise", "replace")}
    bias = methods.build("gda", features="aux").fit(task).bias(task.val)
    table = methods.compare_fusions(rules, task.val, bias, task.val, bias, (1.0,), beta_by="cross-entropy")
    assert table["beta"]["additive"] == pytest.approx(fusion.learn_beta(task.val.zero_shot, bias, task.val.y))
    for name, row in table.drop("replace").iterrows():
        losses = [
            torch.nn.functional.cross_entropy(rules[name](task.val.zero_shot, bias, beta=beta), task.val.y).item()
            for beta in (row["beta"], row["beta"] * 0.9, row["beta"] * 1.1)
        ]
        assert row["beta"] > 0 and losses[0] == min(losses)
    with pytest.raises(ValueError, match="rules linear in it; dynamic is not"):
        compare_rules(task, {"dynamic": fusion.dynamic}, (1.0,), beta_by="cross-entropy")
    with pytest.raises(ValueError, match="'accuracy' or 'cross-entropy', not 'loss'"):
        compare_rules(task, rules, (1.0,), beta_by="loss")


def test_repr_names_method_protocol_and_fixed_params():
    assert repr(methods.build("gda", "fixed", beta=0.5)) == "GDA [fixed](beta=0.5)"
