"""Fusion: how a bias is added to the zero-shot logits, and how uncertain those logits are.

    s = s0 + beta * u(s0) * bias

Rules are pure, and finite on constant rows, one-hot rows and two classes, where the released code gives NaN or
infinity. Rows that are NaN or infinite themselves are refused.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor
from torch.nn.functional import normalize

from lib.metrics import Classes, Labels, Logits, accuracy, predictions

Beta = float | Float[Tensor, "B 1 1"]  # several at once: a rule that is linear in beta then gives [B, n, C]
Fused = Float[Tensor, "*B n C"]
Rule = Callable[..., Tensor]  # (zero_shot, bias, hyper-parameters) -> fused logits
CODE_CONSTANT = 250.0  # what the released code divides the kurtosis by; it was chosen on 1,000 classes
FLOOR = 1e-6  # confidences are kept above this, so that u stays finite


def standardise(logits: Float[Tensor, "*b C"]) -> Float[Tensor, "*b C"]:
    """Z-score of each row, `(v - mean) / std` with C - 1 in the variance; constant rows become zeros."""
    spread, size = logits.amax(-1, keepdim=True) - logits.amin(-1, keepdim=True), logits.abs().amax(-1, keepdim=True)
    constant = spread <= 8 * torch.finfo(logits.dtype).eps * size  # within rounding error
    std = logits.std(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
    return torch.where(constant, 0.0, (logits - logits.mean(dim=-1, keepdim=True)) / std)


def kurtosis(values: Float[Tensor, "n C"]) -> Float[Tensor, " n"]:
    """Kurtosis `mean_c(((v_c - mean) / std)^4)` of each row, AMU-Tuning's eq. 10 without its power.

    About C for a one-hot row, ((C-1)/C)^2 for the flattest; a constant row, which has none, gets that of the flattest.
    """
    return standardise(values).pow(4).mean(dim=-1).clamp_min((1 - 1 / values.shape[-1]) ** 2)


# Numbers that grow with how peaked a row of zero-shot logits, or of their softmax, is.
PEAKEDNESS: dict[str, Callable[[Tensor], Tensor]] = {
    "kurtosis": kurtosis,
    # as released: the maximum is taken out before the temperature and put back undivided
    "energy": lambda v: 2 * (((v - v.amax(-1, keepdim=True)) / 2).logsumexp(-1) + v.amax(-1)),
    "max": lambda v: v.amax(-1),
    "max-min": lambda v: v.amax(-1) - v.amin(-1),
    "top5": lambda v: v.amax(-1) - v.topk(min(5, v.shape[-1])).values[:, -1],  # below five classes the last
    "std": lambda v: v.std(-1),
}
CONFIDENCES = ("none", "entropy", *PEAKEDNESS)


def uncertainty(
    zero_shot: Logits, kind: str = "kurtosis", rho: float = 0.4, on: str = "logits", constant: float = 1.0
) -> Float[Tensor, " n"]:
    """`u(s0)`, the weight of each image's bias, large where zero-shot CLIP is uncertain; finite and positive.

        none      1
        entropy   exp(rho H / log C), H the entropy of softmax(s0)
        std       standard deviation, neither inverted nor raised to rho (as released)
        others    (constant / confidence)^rho, the confidence one of `PEAKEDNESS`, rho at least 0

    The paper measures on `logits`, constant 1; the code on `probabilities`, `CODE_CONSTANT` for the kurtosis.
    Source: AMU-Tuning, eq. 10-11; repository TJU-sjyj/AMU-Tuning, function `uncertainty`.
    """
    if kind not in CONFIDENCES:
        raise ValueError(f"confidence is one of {', '.join(CONFIDENCES)}, not {kind!r}")
    if on not in ("logits", "probabilities"):
        raise ValueError(f"confidence is measured on 'logits' or 'probabilities', not {on!r}")
    if kind == "none":
        return zero_shot.new_ones(len(zero_shot))
    if kind == "entropy":
        entropy = torch.special.entr(zero_shot.softmax(dim=-1)).sum(dim=-1)
        return torch.exp(rho * entropy / math.log(zero_shot.shape[-1]))
    confidence = PEAKEDNESS[kind](zero_shot.softmax(dim=-1) if on == "probabilities" else zero_shot).clamp_min(FLOOR)
    return confidence if kind == "std" else (constant / confidence) ** rho


@dataclass(frozen=True, eq=False)
class Fusion:
    """A rule, called like its function; rows that are not finite are refused."""

    function: Rule
    linear: bool = False  # in beta: the result is s0 + beta * something, and something does not depend on beta
    per_batch: bool = False  # a row's result depends on the other rows of its batch

    @cached_property
    def defaults(self) -> dict[str, object]:  # of its hyper-parameters
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def __call__(self, zero_shot: Logits, bias: Logits, *values: object, **hyper_parameters: object) -> Fused:
        _refuse_non_finite(zero_shot, bias)
        return self.function(zero_shot, bias, *values, **hyper_parameters)

    @property
    def name(self) -> str:
        return self.function.__name__


@partial(Fusion, linear=True)
def additive(zero_shot: Logits, bias: Logits, beta: Beta = 1.0) -> Fused:
    """`s0 + beta * bias`."""
    return zero_shot + beta * bias


@partial(Fusion, linear=True)
def uncertain(
    zero_shot: Logits,
    bias: Logits,
    beta: Beta = 1.0,
    confidence: str = "kurtosis",
    rho: float = 0.4,
    on: str = "logits",
    constant: float = 1.0,
) -> Fused:
    """`s0 + beta * u(s0) * bias`, the bias weighing more where zero-shot CLIP is uncertain (AMU-Tuning, eq. 11)."""
    return zero_shot + beta * uncertainty(zero_shot, confidence, rho, on, constant)[:, None] * bias


@partial(Fusion, linear=True)
def gated(zero_shot: Logits, bias: Logits, beta: Beta = 1.0, threshold: float = 0.5) -> Fused:
    """`s0 + beta * bias` where the largest probability of softmax(s0) is below `threshold` (in [0, 1]), else `s0`."""
    uncertain_rows = zero_shot.softmax(dim=-1).amax(dim=-1, keepdim=True) < threshold
    return zero_shot + beta * (uncertain_rows * bias)


@partial(Fusion, linear=True)
def standardised(zero_shot: Logits, bias: Logits, beta: Beta = 1.0) -> Fused:
    """`s0 + beta * z(bias)`, z-scored over the classes of each image, as AMU-Tuning's code does."""
    return zero_shot + beta * standardise(bias)


@partial(Fusion, linear=True, per_batch=True)
def classwise(zero_shot: Logits, bias: Logits, beta: Beta = 1.0, eps: float = 1e-5) -> Fused:
    """`s0 + beta * (bias - mean) / sqrt(var + eps)`, with mean and variance (divisor n) over the rows of the batch.

    It removes what the bias has of a class as such; a bias with a spread below sqrt(eps) shrinks.
    Source: LumiNet's perception (arXiv 2310.03669); repository ismail31416/LumiNet.
    """
    centred = bias - bias.mean(dim=0)
    return zero_shot + beta * centred / (bias.var(dim=0, correction=0) + eps).sqrt()


@partial(Fusion, linear=True)
def wise(zero_shot: Logits, bias: Logits, beta: Beta = 0.5) -> Fused:
    """`(1 - beta) s0 + beta * bias`; of linear heads on CLIP's features, WiSE-FT's eq. 1 (arXiv 2109.01903)."""
    return zero_shot + beta * (bias - zero_shot)


@Fusion
def dynamic(zero_shot: Logits, bias: Logits, beta: float = 1.0, limit: float = 10.0) -> Logits:
    """`s0 + a b` with the a in [0, limit] of each image that moves CLIP as far from s0 as b is from uniform.

        a = argmin_a (KL(softmax(s0 + a b) || softmax(s0)) - KL(softmax(b) || uniform))^2,    b = beta bias

    The original compares a small model after and before fine-tuning; an auxiliary encoder has no zero-shot classifier,
    so its "before" is uniform. The first divergence rises with a (its derivative is a times a variance): bisection.
    Source: dynamic logit fusion (arXiv 2406.15480), eq. 6.
    """
    step, before = beta * bias, zero_shot.log_softmax(-1)
    target = math.log(bias.shape[-1]) - torch.special.entr(step.softmax(-1)).sum(-1, keepdim=True)
    low, high = torch.zeros_like(target), torch.full_like(target, limit)
    for _ in range(24):
        middle = (low + high) / 2
        moved = (zero_shot + middle * step).log_softmax(-1)
        short = (moved.exp() * (moved - before)).sum(-1, keepdim=True) < target
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return zero_shot + (low + high) / 2 * step


@Fusion
def mixture(zero_shot: Logits, bias: Logits, beta: float = 1.0, temperature: float = 1.0) -> Logits:
    """`perception` of two contexts, `s0` and `s0 + beta * bias`, on the scale of `s0`."""
    contexts = torch.stack([zero_shot, zero_shot + beta * bias], dim=-1)
    return perception(contexts, temperature=temperature) + zero_shot.logsumexp(dim=-1, keepdim=True)


@Fusion
def replace(zero_shot: Logits, bias: Logits) -> Logits:
    """The bias alone: for methods whose predictor starts from the class texts itself."""
    return bias


@Fusion
def zs_norm(zero_shot: Logits, bias: Logits, beta: float = 1.0) -> Logits:
    """`s0 + beta * bias` stretched to the range of `s0` in each image: no answer changes, the confidence does.

    Source: ZS-Norm, as SaLS at inference (arXiv 2407.13588); repository Bala93/CLIPCalib at 16afc54.
    """
    fused = zero_shot + beta * bias
    (low, high), (least, most) = (logits.aminmax(dim=-1, keepdim=True) for logits in (fused, zero_shot))
    return (fused - low) / (high - low).clamp_min(FLOOR) * (most - least) + least


RULES = (additive, uncertain, gated, standardised, classwise, wise, dynamic, mixture, replace)
FUSIONS: dict[str, Fusion] = {rule.name: rule for rule in RULES}  # of which notebook 04 asks who answers better
ALL: dict[str, Fusion] = FUSIONS | {zs_norm.name: zs_norm}


def perception(
    logits: Float[Tensor, "n C Z"], contexts: Float[Tensor, "n Z"] | None = None, temperature: float = 1.0
) -> Logits:
    """`log p(y|x)` from the logits s in each of Z contexts (PerceptionCLIP).

        p(y|x) = sum_z p(z|x) softmax_y(s_yz),    p(z|x) = softmax_z(q / temperature),
        or, without `contexts`, p(z|x) = sum_y exp(s_yz / temperature) / sum_yz exp(s_yz / temperature)

    s and `contexts`, q, are 100 times the cosine to the text of class y in context z, and to that of z alone.
    Source: PerceptionCLIP (arXiv 2308.01313); repository umd-huang-lab/perceptionCLIP, `classify`.
    """
    q = contexts / temperature if contexts is not None else (logits / temperature).logsumexp(dim=1)
    return (q.log_softmax(-1)[:, None] + logits.log_softmax(dim=1)).logsumexp(dim=-1)


def similarity(zero_shot: Logits, biases: Float[Tensor, "k n C"], norm: str = "mean") -> Logits:
    """One bias from several, each weighted per image by its agreement with the zero-shot logits.

        sum_k w_k norm(bias_k),    w = softmax_k(sum_c norm(bias_k)_c norm(s0)_c)

    The norm is `mean` (z-score of a row), `softmax` or `linear` (unit length). With z-scores the sum over classes is
    C - 1 times a correlation, so the softmax nearly picks one bias.
    Source: CaFo (arXiv 2303.02151); repository OpenGVLab/CaFo, `logits_fuse`.
    """
    norms = {"mean": standardise, "softmax": lambda v: v.softmax(-1), "linear": lambda v: normalize(v, dim=-1)}
    if norm not in norms:
        raise ValueError(f"norm is one of {', '.join(norms)}, not {norm!r}")
    normed = norms[norm](biases)
    agreement = (normed * norms[norm](zero_shot)).sum(dim=-1, keepdim=True)
    return (agreement.softmax(dim=0) * normed).sum(dim=0)


def learn_beta(zero_shot: Logits, bias: Logits, y: Labels, limit: float = 1e4) -> float:
    """The beta in [0, limit] that minimises the cross-entropy of `s0 + beta * bias`, a convex function of it.

    Its gradient, `mean_i sum_c (p_ic - Y_ic) bias_ic`, rises with beta. 0 if no positive beta lowers the loss; `limit`
    if it keeps falling. Images the bias was fitted on give too large a beta: take others.
    """
    _refuse_non_finite(zero_shot, bias)
    s0, b = zero_shot.double(), bias.double()
    target = b.gather(1, y[:, None]).mean()

    def gradient(beta: float) -> float:
        return (((s0 + beta * b).softmax(1) * b).sum(1).mean() - target).item()

    if gradient(0.0) >= 0:
        return 0.0
    return limit if gradient(limit) < 0 else float(brentq(gradient, 0.0, limit, xtol=1e-9))


def accuracy_over_beta(
    rule: Rule, zero_shot: Logits, bias: Logits, y: Labels, betas: Sequence[float], classes: Classes = None
) -> list[float]:
    """Accuracy in [0, 1] of `rule(zero_shot, bias, beta=...)` at each beta, as a loop over them gives it.

    Under a row-wise rule that is linear in beta a class wins on one interval of beta, so the winner at both ends of
    the range wins between. The rule is called on the other images only, with many betas at once.
    """
    traits, labelled = entry(rule), int((y >= 0).sum())
    if len(betas) < 4 or not labelled or not traits.linear or traits.per_batch:
        return [accuracy(rule(zero_shot, bias, beta=beta), y, classes) for beta in betas]
    first, last = (predictions(rule(zero_shot, bias, beta=end), classes) for end in (min(betas), max(betas)))
    always, rows = int(((first == last) & (first == y)).sum()), (first != last) & (y >= 0)
    if not rows.any():
        return [always / labelled] * len(betas)
    s0, b, y = zero_shot[rows], bias[rows], y[rows]
    columns = torch.arange(b.shape[1]) if classes is None else classes
    parts = torch.tensor(betas, dtype=b.dtype)[:, None, None].split(max(1, 2**22 // b.numel()))
    counts = torch.cat([(columns[rule(s0, b, beta=part)[..., columns].argmax(-1)] == y).sum(-1) for part in parts])
    return [(always + count) / labelled for count in counts.tolist()]


def entry(rule: Rule) -> Fusion:
    """The `Fusion` behind a `functools.partial` of one; any other function as one."""
    function = rule.func if isinstance(rule, partial) else rule
    return function if isinstance(function, Fusion) else Fusion(function)


def _refuse_non_finite(zero_shot: Tensor, bias: Tensor) -> None:
    """Argmax would predict the class of a NaN."""
    if zero_shot.shape != bias.shape:
        raise ValueError(f"zero-shot logits are {list(zero_shot.shape)}, bias logits {list(bias.shape)}")
    for name, logits in (("zero-shot", zero_shot), ("bias", bias)):
        if not torch.isfinite(logits.sum()) and (bad := int((~torch.isfinite(logits).all(dim=-1)).sum())):
            raise ValueError(f"{bad} of {len(logits)} rows of the {name} logits hold NaN or infinite values")
