"""Fusion rules: the authors' numbers, beta = 0, odd rows, and the search over beta."""

import math
from functools import partial

import authors
import pytest
import torch

from lib import fusion, metrics

THEIRS = {"moment": "kurtosis", "var": "std"}  # the code's names for two of our confidences


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    zero_shot = 25 + 2 * torch.randn(80, 7, generator=generator)
    return zero_shot, torch.randn(80, 7, generator=generator), torch.randint(7, (80,), generator=generator)


@pytest.mark.parametrize("rho", [0.4, 1.0])
@pytest.mark.parametrize("kind", ["entropy", "energy", "max", "max-min", "var", "top5", "moment"])
def test_uncertainty_agrees_with_the_released_code(kind, rho):
    amu = authors.outputs("amu")
    constant = fusion.CODE_CONSTANT if kind == "moment" else 1.0
    ours = fusion.uncertainty(amu["zs_logits_test"], THEIRS.get(kind, kind), rho, "probabilities", constant)
    assert authors.error(ours, amu[f"uncertainty/{kind}/p{rho}"][:, 0]) < 1e-4


@pytest.mark.parametrize("on", ["logits", "probabilities"])
@pytest.mark.parametrize("kind", fusion.CONFIDENCES)
def test_uncertainty_is_finite_where_the_released_code_is_not(kind, on):
    rows = authors.outputs("amu")["edge_logits"]
    for odd in (rows, torch.tensor([[200.0, 0.0], [0.0, 0.0], [-5.0, -5.0]])):
        ours = fusion.uncertainty(odd, kind, on=on)
        assert torch.isfinite(ours).all()
        assert (ours > 0).all()


@pytest.mark.parametrize("norm", ["mean", "softmax", "linear"])
def test_similarity_agrees_with_cafo(norm):
    cafo = authors.outputs("cafo_fusion")
    caches = torch.stack([cafo["clip_cache_logits_test"], cafo["aux_cache_logits_test"]])
    fused = fusion.similarity(cafo["zs_logits_test"], caches, norm)
    assert authors.error(fused, cafo[f"{norm}/fused"]) < 1e-4
    assert authors.error(fusion.additive(cafo["zs_logits_test"], fused, 1.3), cafo[f"{norm}/final_logits"]) < 1e-4


def test_classwise_agrees_with_luminet():
    inputs, luminet = authors.outputs("scores_inputs"), authors.outputs("luminet")
    zero_shot = 100 * inputs["img_test"] @ inputs["text"].T
    ours = fusion.classwise(torch.zeros_like(zero_shot), zero_shot)
    assert authors.error(ours, luminet["perception_zs"]) < 1e-4


@pytest.mark.parametrize("temperature", [1, 5])
@pytest.mark.parametrize("mode", [0, 1])
def test_perception_agrees_with_perceptionclip(mode, temperature):
    inputs, theirs = authors.outputs("scores_inputs"), authors.outputs("perceptionclip")
    logits = 100 * torch.einsum("nd,czd->ncz", inputs["img_test"], inputs["text_yz"])
    contexts = 100 * inputs["img_test"] @ inputs["text_factor"].T if mode else None
    ours = fusion.perception(logits, contexts, float(temperature)).exp()
    assert authors.error(ours, theirs[f"probs_mode{mode}_T{temperature}"]) < 1e-4


@pytest.mark.parametrize("rule", [r for r in fusion.ALL.values() if r is not fusion.replace])
def test_beta_zero_gives_zero_shot_back(rule, logits):
    zero_shot, bias, _ = logits
    assert torch.allclose(rule(zero_shot, bias, beta=0.0), zero_shot, atol=1e-5)


@pytest.mark.parametrize("rule", fusion.ALL.values())
def test_odd_rows_stay_finite_and_inputs_untouched(rule):
    for classes in (2, 12):
        one_hot = torch.zeros(4, classes)
        one_hot[:, 0] = 300.0
        constant = torch.full((4, classes), 20.0)
        for zero_shot in (one_hot, constant):
            for bias in (one_hot, constant, torch.zeros(4, classes)):
                before = zero_shot.clone(), bias.clone()
                assert torch.isfinite(rule(zero_shot, bias)).all()
                assert torch.equal(before[0], zero_shot)
                assert torch.equal(before[1], bias)


@pytest.mark.parametrize("rule", fusion.ALL.values())
def test_rows_that_are_not_finite_are_refused_and_counted(rule, logits):
    zero_shot, bias, _ = logits
    broken = bias.clone()
    broken[[2, 5, 7], 1] = torch.nan
    with pytest.raises(ValueError, match="3 of 80 rows of the bias"):
        rule(zero_shot, broken)
    with pytest.raises(ValueError, match="3 of 80 rows of the zero-shot"):
        rule(broken, bias)


@pytest.mark.parametrize("rule", [rule for rule in fusion.ALL.values() if "beta" in rule.defaults])
def test_rules_are_linear_in_beta_and_depend_on_other_rows_as_declared(rule, logits):
    zero_shot, bias, _ = logits
    one, three = (rule(zero_shot, bias, beta=beta) - zero_shot for beta in (1.0, 3.0))
    assert torch.allclose(three, 3 * one, atol=1e-4) == rule.linear
    few = rule(zero_shot[:9], bias[:9])
    assert torch.allclose(few, rule(zero_shot, bias)[:9], atol=1e-5) != rule.per_batch


def test_fusions_have_the_names_and_defaults_of_their_functions():
    assert all(
        rule.name == name and fusion.entry(rule.function).defaults == rule.defaults for name, rule in fusion.ALL.items()
    )
    assert fusion.uncertain.defaults["rho"] == 0.4 and "beta" not in fusion.replace.defaults
    assert fusion.entry(partial(fusion.wise, beta=0.1)) is fusion.wise
    assert not fusion.entry(lambda zero_shot, bias, beta=1.0: zero_shot).linear


def test_dynamic_moves_clip_as_far_as_the_bias_moves(logits):
    zero_shot, bias, _ = logits
    fused = fusion.dynamic(zero_shot, bias, beta=0.5, limit=50.0)
    p, p0, q = (v.double().softmax(1) for v in (fused, zero_shot, 0.5 * bias))
    moved = (p * (p / p0).log()).sum(1)
    target = (q * (q * 7).log()).sum(1)
    a = ((fused - zero_shot) * bias).sum(1) / (0.5 * bias * bias).sum(1)
    reachable = a < 49  # no bias moves the rest as far
    assert reachable.sum() > 70
    assert torch.allclose(moved[reachable], target[reachable], rtol=1e-3)


def test_a_gate_leaves_confident_images_alone(logits):
    zero_shot, bias, _ = logits
    confident = zero_shot.softmax(1).amax(1) >= 0.4
    fused = fusion.gated(zero_shot, bias, threshold=0.4)
    assert 0 < confident.sum() < 80
    assert torch.equal(fused[confident], zero_shot[confident])
    assert torch.equal(fused[~confident], (zero_shot + bias)[~confident])


def test_wise_is_the_interpolation_of_weights():
    theirs = authors.outputs("cross_modal")
    zero_shot = 100 * authors.task().test.clip @ theirs["zero_shot_weights"].T
    fused = fusion.wise(zero_shot, theirs["test_logits_given"], 0.5)
    assert authors.error(fused, theirs["test_logits_given_wiseft0.5"]) < 1e-4


def test_learned_beta_minimises_cross_entropy(logits):
    zero_shot, bias, y = logits
    bias = bias + 1.5 * torch.nn.functional.one_hot(y, 7)

    def loss(beta):
        return torch.nn.functional.cross_entropy((zero_shot + beta * bias).double(), y).item()

    beta = fusion.learn_beta(zero_shot, bias, y)
    assert all(loss(beta) <= loss(beta + step) for step in (-0.01, 0.01))
    assert fusion.learn_beta(zero_shot, -bias, y) == 0.0  # a bias that only hurts
    perfect = torch.nn.functional.one_hot(y, 7).float()
    assert fusion.learn_beta(torch.zeros(80, 7), perfect, y, limit=8.0) == 8.0


@pytest.mark.parametrize("rule", [rule for rule in fusion.ALL.values() if "beta" in rule.defaults])
@pytest.mark.parametrize("ties", [False, True])
def test_accuracy_over_beta_is_the_plain_loop(rule, ties, logits):
    zero_shot, bias, y = logits
    if ties:  # whole numbers meet exactly, at whole betas and along whole rows
        zero_shot, bias = zero_shot.round(), bias.round()
    betas = [0.0, 1.0, 2.0, *torch.logspace(-4, 3, 60).tolist()]
    accuracies = fusion.accuracy_over_beta(rule, zero_shot, bias, y, betas)
    assert accuracies == [metrics.accuracy(rule(zero_shot, bias, beta=beta), y) for beta in betas]
    y, classes = y.where(y < 5, -1), torch.tensor([4, 0, 1, 3])
    accuracies = fusion.accuracy_over_beta(rule, zero_shot, bias, y, betas, classes)
    assert accuracies == [metrics.accuracy(rule(zero_shot, bias, beta=beta), y, classes) for beta in betas]
    same = [0.0, 1e-9, 2e-9, 3e-9]  # no prediction changes
    assert fusion.accuracy_over_beta(rule, zero_shot, bias, y, same) == [
        metrics.accuracy(rule(zero_shot, bias, beta=beta), y) for beta in same
    ]


def test_accuracy_over_beta_calls_the_rule_on_the_changing_rows_alone(logits):
    zero_shot, bias, y = logits
    rows = []

    @partial(fusion.Fusion, linear=True)
    def counted(zero_shot, bias, beta=1.0):
        rows.append(len(bias))
        return zero_shot + beta * bias

    betas = torch.linspace(0, 1, 30).tolist()
    assert fusion.accuracy_over_beta(counted, zero_shot, bias, y, betas) == fusion.accuracy_over_beta(
        fusion.additive, zero_shot, bias, y, betas
    )
    changing = int((zero_shot.argmax(1) != (zero_shot + bias).argmax(1)).sum())
    assert 0 < changing < 40 and rows == [80, 80, changing]


def test_accuracy_over_beta_is_nan_without_labelled_images(logits):
    zero_shot, bias, y = logits
    accuracies = fusion.accuracy_over_beta(
        fusion.additive, zero_shot, bias, torch.full_like(y, -1), [0.0, 1.0, 2.0, 3.0]
    )
    assert len(accuracies) == 4 and all(map(math.isnan, accuracies))


def test_accuracy_over_beta_takes_rules_with_their_settings(logits):
    zero_shot, bias, y = logits
    rule = partial(fusion.uncertain, confidence="max", rho=1.0)
    betas = torch.linspace(0, 50, 30).tolist()
    accuracies = fusion.accuracy_over_beta(rule, zero_shot, bias, y, betas)
    assert accuracies == [metrics.accuracy(rule(zero_shot, bias, beta=beta), y) for beta in betas]
    assert len(set(accuracies)) > 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z, b: fusion.uncertainty(z, "depth"), "kurtosis.*'depth'"),
        (lambda z, b: fusion.uncertainty(z, on="features"), "'logits' or 'probabilities', not 'features'"),
        (lambda z, b: fusion.similarity(z, b[None], "l1"), "'l1'"),
    ],
)
def test_unknown_words_are_refused(call, words, logits):
    with pytest.raises(ValueError, match=words):
        call(*logits[:2])


def test_zs_norm_keeps_the_answers_and_takes_the_range_of_zero_shot(logits):
    zero_shot, bias, _ = logits
    fused, plain = fusion.zs_norm(zero_shot, bias, beta=3.0), fusion.additive(zero_shot, bias, beta=3.0)
    assert torch.equal(fused.argmax(1), plain.argmax(1)) and torch.equal(fused.argsort(1), plain.argsort(1))
    for ours, theirs in zip(fused.aminmax(dim=1), zero_shot.aminmax(dim=1), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    for row, (s, s0) in enumerate(zip(plain.tolist(), zero_shot.tolist(), strict=True)):
        expected = [(v - min(s)) / (max(s) - min(s)) * (max(s0) - min(s0)) + min(s0) for v in s]
        assert fused[row].tolist() == pytest.approx(expected, abs=1e-4)
    rebuilt = fusion.zs_norm(zero_shot, fusion.uncertain(zero_shot, bias, 2.0) - zero_shot)  # after any other rule
    assert torch.equal(rebuilt.argmax(1), fusion.uncertain(zero_shot, bias, 2.0).argmax(1))
    assert "zs_norm" in fusion.ALL and "zs_norm" not in fusion.FUSIONS, "it answers what additive answers"
