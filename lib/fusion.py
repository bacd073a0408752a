"""Fusion: how a bias is added to the zero-shot logits, and how sure those logits are.

    s = s0 + beta * u(s0) * bias

`uncertainty` is `u`: a factor per image, large where zero-shot CLIP is unsure. Every function is pure, row-wise
and finite on constant rows, one-hot rows and two classes, where the released code gives NaN or infinity.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

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


def fixed(zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], beta: float = 1.0) -> Float[Tensor, "n C"]:
    """Return `s0 + beta * bias`."""
    return zero_shot + beta * bias


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
    return zero_shot + beta * uncertainty(zero_shot, confidence, rho, on, constant)[:, None] * bias


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
    return bias


def _is_constant(values: Float[Tensor, "*b C"]) -> Tensor:
    """Tell rows whose spread is rounding noise, `[*b, 1]`."""
    spread = values.amax(dim=-1, keepdim=True) - values.amin(dim=-1, keepdim=True)
    return spread <= 8 * torch.finfo(values.dtype).eps * values.abs().amax(dim=-1, keepdim=True)
