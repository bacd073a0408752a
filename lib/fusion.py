"""Fusion: how a bias is added to the zero-shot logits, and how sure those logits are.

    s = s0 + beta * u(s0) * bias

`uncertainty` is `u`: a factor per image, large where zero-shot CLIP is unsure. Every function is pure, row-wise (but
for `classwise`) and finite on constant rows, one-hot rows and two classes, where the released code gives NaN or
infinity. Rows that are NaN or infinite themselves are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from lib.metrics import accuracy

Rule = Callable[..., Tensor]  # (zero_shot, bias, hyper-parameters) -> fused logits
CONFIDENCES = ("none", "kurtosis", "entropy", "energy", "max", "max-min", "top5", "std")
CODE_CONSTANT = 250.0  # what the released code divides the kurtosis by; it was chosen on 1,000 classes
FLOOR = 1e-6  # confidences are kept above this, so that no image gets an infinite factor


def standardise(logits: Float[Tensor, "*b C"]) -> Float[Tensor, "*b C"]:
    """Return the z-score of each row, `(v - mean) / std` with C - 1 in the variance; constant rows become zeros."""
    centred = logits - logits.mean(dim=-1, keepdim=True)
    std = logits.std(dim=-1, keepdim=True)
    return torch.where(_is_constant(logits), 0.0, centred / std.clamp_min(torch.finfo(logits.dtype).tiny))


def kurtosis(values: Float[Tensor, "n C"]) -> Float[Tensor, " n"]:
    """Return `mean_c(((v_c - mean) / std)^4)`, at least ((C-1)/C)^2 and about C for a one-hot row.

    A constant row has no kurtosis; it gets the lowest possible value, that of the flattest row.

    Source: AMU-Tuning, eq. 10 without its power.
    """
    flattest = ((values.shape[-1] - 1) / values.shape[-1]) ** 2
    return standardise(values).pow(4).mean(dim=-1).clamp_min(flattest)


def confidence(values: Float[Tensor, "n C"], kind: str) -> Float[Tensor, " n"]:
    """Return a positive number per row that grows with how peaked the row is.

    Args:
        values: zero-shot logits or their softmax.
        kind: `kurtosis`; `energy`, `2 (logsumexp((v - max) / 2) + max)`; `max`; `max-min`; `top5`, the first minus
            the fifth value (the last, below five classes); `std`.
    """
    top = values.max(dim=-1).values
    if kind == "kurtosis":
        found = kurtosis(values)
    elif kind == "energy":
        # as released: the maximum is taken out before the temperature and put back undivided
        found = 2 * (torch.logsumexp((values - top[:, None]) / 2, dim=-1) + top)
    elif kind == "max":
        found = top
    elif kind == "max-min":
        found = top - values.min(dim=-1).values
    elif kind == "top5":
        found = top - values.topk(min(5, values.shape[-1]), dim=-1).values[:, -1]
    elif kind == "std":
        found = values.std(dim=-1)
    else:
        raise ValueError(f"confidence is one of {', '.join(CONFIDENCES)}, not {kind!r}")
    return found.clamp_min(FLOOR)


def uncertainty(
    zero_shot: Float[Tensor, "n C"],
    kind: str = "kurtosis",
    rho: float = 0.4,
    on: str = "logits",
    constant: float = 1.0,
) -> Float[Tensor, " n"]:
    """Return `u(s0)`, the factor by which the bias of each image is weighted; always finite and positive.

        none      1
        entropy   exp(rho H / log C), H the entropy of softmax(s0)
        std       standard deviation, neither inverted nor raised to rho (as released)
        others    (constant / confidence)^rho

    Args:
        kind: one of `CONFIDENCES`.
        rho: power, 0 or more; 0 switches the weighting off (but for `std`).
        on: `logits` (the paper's equations) or `probabilities` (the released code).
        constant: 1 in the paper; the code uses 250, for the kurtosis only.

    Source: AMU-Tuning, eq. 10-11; repository TJU-sjyj/AMU-Tuning, function `uncertainty`.
    """
    if on not in ("logits", "probabilities"):
        raise ValueError(f"confidence is measured on 'logits' or 'probabilities', not {on!r}")
    if kind == "none":
        return torch.ones(len(zero_shot), dtype=zero_shot.dtype)
    if kind == "entropy":
        entropy = torch.special.entr(zero_shot.softmax(dim=-1)).sum(dim=-1)
        return torch.exp(rho * entropy / math.log(zero_shot.shape[-1]))
    found = confidence(zero_shot.softmax(dim=-1) if on == "probabilities" else zero_shot, kind)
    return found if kind == "std" else (constant / found) ** rho


def additive(zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], beta: float = 1.0) -> Float[Tensor, "n C"]:
    """Return `s0 + beta * bias`."""
    _refuse_non_finite(zero_shot, bias)
    return zero_shot + beta * bias


def learned(zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], beta: float = 1.0) -> Float[Tensor, "n C"]:
    """Return `s0 + beta * bias`; methods with this rule take beta from `learn_beta` on the validation images."""
    return additive(zero_shot, bias, beta)


def learn_beta(
    zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], y: Int64[Tensor, " n"], limit: float = 1e4
) -> float:
    """Return the beta in [0, limit] that minimises the cross-entropy of `s0 + beta * bias`, a convex function of it.

    Its slope, `mean_i sum_c (p_ic - Y_ic) bias_ic`, rises with beta, so bisection finds the zero. 0 means that the bias
    helps no one, `limit` that it separates the images. The images must not be the ones the bias was fitted on: those it
    fits too well, and beta would only grow with the overfit. Without validation images a published constant serves.
    """
    _refuse_non_finite(zero_shot, bias)
    s0, b = zero_shot.double(), bias.double()
    target = b.gather(1, y[:, None]).mean()

    def slope(beta: float) -> float:
        return (((s0 + beta * b).softmax(1) * b).sum(1).mean() - target).item()

    low, high = 0.0, 1.0
    if slope(low) >= 0:
        return low
    while slope(high) < 0:
        if high >= limit:
            return limit
        low, high = high, min(2 * high, limit)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return high


def uncertain(
    zero_shot: Float[Tensor, "n C"],
    bias: Float[Tensor, "n C"],
    beta: float = 1.0,
    confidence: str = "kurtosis",
    rho: float = 0.4,
    on: str = "logits",
    constant: float = 1.0,
) -> Float[Tensor, "n C"]:
    """Return `s0 + beta * u(s0) * bias`, the bias weighing more where zero-shot CLIP is unsure (AMU-Tuning, eq. 11)."""
    _refuse_non_finite(zero_shot, bias)
    return zero_shot + beta * uncertainty(zero_shot, confidence, rho, on, constant)[:, None] * bias


def gated(
    zero_shot: Float[Tensor, "n C"],
    bias: Float[Tensor, "n C"],
    beta: float = 1.0,
    gate: str = "max",
    threshold: float = 0.5,
) -> Float[Tensor, "n C"]:
    """Return `s0 + beta * bias` where zero-shot CLIP is less sure than `threshold`, and `s0` elsewhere.

    Args:
        gate: `max`, the largest probability of softmax(s0), or `margin`, its lead over the second.
        threshold: in [0, 1]; 0 never adds the bias.
    """
    _refuse_non_finite(zero_shot, bias)
    top = zero_shot.softmax(dim=-1).topk(min(2, zero_shot.shape[-1]), dim=-1).values
    if gate not in ("max", "margin"):
        raise ValueError(f"gate is 'max' or 'margin', not {gate!r}")
    sure = top[:, 0] if gate == "max" else top[:, 0] - top[:, -1]
    return zero_shot + beta * (sure < threshold).to(bias.dtype)[:, None] * bias


def standardised(
    zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], beta: float = 1.0
) -> Float[Tensor, "n C"]:
    """Return `s0 + beta * z(bias)`, z-scored over the classes of each image, as AMU-Tuning's code does."""
    _refuse_non_finite(zero_shot, bias)
    return zero_shot + beta * standardise(bias)


def classwise(
    zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], beta: float = 1.0, eps: float = 1e-5
) -> Float[Tensor, "n C"]:
    """Return `s0 + beta * (bias - mean) / sqrt(var + eps)`, z-scored over the images of each class.

    Mean and variance (divisor n) are those of the rows given, so a row's result depends on the rows around it. It takes
    away what the bias says about a class as such; a bias with a spread below sqrt(eps) shrinks.

    Source: LumiNet's perception (arXiv 2310.03669); repository ismail31416/LumiNet.
    """
    _refuse_non_finite(zero_shot, bias)
    centred = bias - bias.mean(dim=0)
    return zero_shot + beta * centred / (bias.var(dim=0, correction=0) + eps).sqrt()


def wise(zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], beta: float = 0.5) -> Float[Tensor, "n C"]:
    """Return `(1 - beta) s0 + beta * bias`.

    For linear heads on CLIP's features this is the interpolation of weights, `100 f ((1 - beta) T + beta W)^T`.

    Source: WiSE-FT (arXiv 2109.01903), eq. 1.
    """
    _refuse_non_finite(zero_shot, bias)
    return zero_shot + beta * (bias - zero_shot)


def dynamic(
    zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], beta: float = 1.0, limit: float = 10.0
) -> Float[Tensor, "n C"]:
    """Return `s0 + a b` with the a of each image that moves CLIP as far as b itself is from knowing nothing.

        a = argmin_a (KL(softmax(s0 + a b) || softmax(s0)) - KL(softmax(b) || uniform))^2,    b = beta bias

    over [0, limit].
    The original compares a small model after and before fine-tuning; an auxiliary encoder has no zero-shot classifier,
    so its "before" is uniform. The first divergence rises with a (its slope is a times a variance): bisection.

    Source: dynamic logit fusion (arXiv 2406.15480), eq. 6.
    """
    _refuse_non_finite(zero_shot, bias)
    steps, before = beta * bias, zero_shot.log_softmax(-1)
    after = steps.log_softmax(-1)
    shift = (after.exp() * after).sum(-1, keepdim=True) + math.log(bias.shape[-1])
    low, high = torch.zeros_like(shift), torch.full_like(shift, limit)
    for _ in range(24):
        middle = (low + high) / 2
        moved = (zero_shot + middle * steps).log_softmax(-1)
        short = (moved.exp() * (moved - before)).sum(-1, keepdim=True) < shift
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return zero_shot + (low + high) / 2 * steps


def mixture(
    zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], beta: float = 1.0, temperature: float = 1.0
) -> Float[Tensor, "n C"]:
    """Return `log sum_z p(z) softmax(s_z)` over two opinions, `s0` and `s0 + beta * bias`, on the scale of `s0`.

    This is `perception` with opinions for contexts: the one with the larger logits is believed more.
    """
    _refuse_non_finite(zero_shot, bias)
    opinions = torch.stack([zero_shot, zero_shot + beta * bias], dim=-1)
    return perception(opinions, temperature=temperature) + zero_shot.logsumexp(dim=-1, keepdim=True)


def perception(
    logits: Float[Tensor, "n C Z"], contexts: Float[Tensor, "n Z"] | None = None, temperature: float = 1.0
) -> Float[Tensor, "n C"]:
    """Return `log p(y|x)` from logits in each of Z contexts (PerceptionCLIP).

        p(y|x) = sum_z p(z|x) softmax_y(s_yz),    p(z|x) = softmax_z(q / temperature),
        or, without `contexts`, p(z|x) = sum_y exp(s_yz / temperature) / sum_yz exp(s_yz / temperature)

    Args:
        logits: s, 100 times the cosine to the text of class y in context z.
        contexts: q, 100 times the cosine to the text of context z alone.
        temperature: above 0, of p(z|x) only. Everything stays in logarithms, so none is too small.

    Source: PerceptionCLIP (arXiv 2308.01313); repository umd-huang-lab/perceptionCLIP, `classify`.
    """
    given = contexts / temperature if contexts is not None else (logits / temperature).logsumexp(dim=1)
    return (given.log_softmax(-1)[:, None] + logits.log_softmax(dim=1)).logsumexp(dim=-1)


def similarity(
    zero_shot: Float[Tensor, "n C"], biases: Float[Tensor, "k n C"], norm: str = "mean"
) -> Float[Tensor, "n C"]:
    """Return one bias from several, each weighed per image by its agreement with the zero-shot logits.

        sum_k w_k norm(bias_k),    w = softmax_k(sum_c norm(bias_k)_c norm(s0)_c)

    With z-scores the sum over classes is C - 1 times a correlation, so the softmax nearly picks one bias.

    Args:
        norm: `mean` (z-score of a row), `softmax` or `linear` (unit length).

    Source: CaFo (arXiv 2303.02151); repository OpenGVLab/CaFo, `logits_fuse`.
    """
    norms = {"mean": standardise, "softmax": lambda v: v.softmax(-1), "linear": lambda v: normalize(v, dim=-1)}
    if norm not in norms:
        raise ValueError(f"norm is one of {', '.join(norms)}, not {norm!r}")
    scaled = norms[norm](biases)
    agreement = (scaled * norms[norm](zero_shot)).sum(dim=-1, keepdim=True)
    return (agreement.softmax(dim=0) * scaled).sum(dim=0)


def replace(zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    """Return the bias alone: for methods whose predictor already holds the zero-shot knowledge."""
    _refuse_non_finite(zero_shot, bias)
    return bias


FUSIONS = {
    rule.__name__: rule
    for rule in (additive, learned, uncertain, gated, standardised, classwise, wise, dynamic, mixture, replace)
}
LINEAR_IN_BETA = (additive, learned, uncertain, gated, standardised, classwise, wise)  # s0 + beta * something


def accuracy_over_beta(
    rule: Rule,
    zero_shot: Float[Tensor, "n C"],
    bias: Float[Tensor, "n C"],
    y: Int64[Tensor, " n"],
    betas: Sequence[float],
) -> list[float]:
    """Return the accuracy in [0, 1] of `rule(zero_shot, bias, beta=...)` at each beta, as a loop over them would.

    Along a rule that is linear in beta, each logit of an image is a line, so a class wins on one interval of beta: who
    wins at both ends of the range wins throughout. Only images whose winner changes, a few, are followed in between,
    all betas at once. Where one of them is within rounding of a tie, that beta is evaluated in the plain way.
    """
    plain = rule.func if isinstance(rule, partial) else rule
    if len(betas) < 4 or plain not in LINEAR_IN_BETA:
        return [accuracy(rule(zero_shot, bias, beta=beta), y) for beta in betas]
    first, last = (rule(zero_shot, bias, beta=end).argmax(1) for end in (min(betas), max(betas)))
    changing = torch.nonzero(first != last)[:, 0]
    settled = int(((first == last) & (first == y)).sum())
    far = 1024.0  # a power of two, so that dividing by it rounds nothing
    start, truth = zero_shot[changing], y[changing, None]
    direction = (rule(zero_shot, bias, beta=far)[changing] - start) / far
    rivals = start.scatter(1, truth, -torch.inf)
    start_y, direction_y = start.gather(1, truth), direction.gather(1, truth)
    noise = 8 * torch.finfo(start.dtype).eps
    size, growth = (noise * v.abs().amax(1) for v in (start, direction))
    found = []
    at = torch.tensor(betas, dtype=start.dtype)[:, None, None]
    for part in at.split(max(1, 2**22 // max(1, start.numel()))):
        ahead = (start_y + part * direction_y)[..., 0] - (rivals + part * direction).amax(2)
        unsure = (ahead.abs() <= size + part[..., 0].abs() * growth).any(1)
        shares = ((settled + (ahead > 0).sum(1)) / len(y)).tolist()
        for share, plainly in zip(shares, unsure.tolist(), strict=True):
            beta = betas[len(found)]
            found.append(accuracy(rule(zero_shot, bias, beta=beta), y) if plainly else share)
    return found


def _refuse_non_finite(zero_shot: Tensor, bias: Tensor) -> None:
    """A row with NaN would be a vote for class 0."""
    if zero_shot.shape != bias.shape:
        raise ValueError(f"zero-shot logits are {list(zero_shot.shape)}, bias logits {list(bias.shape)}")
    for name, logits in (("zero-shot", zero_shot), ("bias", bias)):
        if torch.isfinite(logits.sum()):  # one pass; a sum that overflows is looked at again
            continue
        if bad := int((~torch.isfinite(logits).all(dim=-1)).sum()):
            raise ValueError(f"{bad} of {len(logits)} rows of the {name} logits hold NaN or infinite values")


def _is_constant(values: Float[Tensor, "*b C"]) -> Tensor:
    """Tell rows whose spread is rounding noise, `[*b, 1]`."""
    spread = values.amax(dim=-1, keepdim=True) - values.amin(dim=-1, keepdim=True)
    return spread <= 8 * torch.finfo(values.dtype).eps * values.abs().amax(dim=-1, keepdim=True)
