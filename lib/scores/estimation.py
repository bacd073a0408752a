"""The accuracy of a classifier on images without labels, from its logits there and on validation images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lib import metrics
from lib.metrics import Logits
from lib.scores.confidence import CONFIDENCES

SOFTMAX_ABOVE = 5.0  # MaNo takes the softmax where logits are further from uniform than this


def taylor(logits: Logits) -> Logits:
    """Rows of `1 + z + z^2 / 2` shifted to be at least 0 and summing to 1; uniform where that is constant.

    MaNo's other normalisation. It changes with a shift and with a scale of the logits.
    """
    v = 1 + logits + logits**2 / 2
    v = v - v.amin(-1, keepdim=True)
    total = v.sum(-1, keepdim=True)
    return torch.where(total > 0, v / total.clamp_min(torch.finfo(v.dtype).tiny), 1 / v.shape[-1])


def from_uniform(logits: Logits) -> float:
    """Mean cross-entropy of softmax(logits) to the uniform distribution, `mean_n(logsumexp(z) - mean_c z_c)`."""
    return (logits.logsumexp(-1) - logits.mean(-1)).mean().item()


def mano(logits: Logits) -> float:
    """`(mean_nc Q^4)^(1/4)`, which rises with accuracy but is none; between C^-1 and C^(-1/4).

    Q is softmax(logits) where `from_uniform` exceeds 5, else their `taylor`. The switch depends on the logits' scale:
    the same classifier at 100 cos and at cos is measured by two formulas.
    Source: MaNo (arXiv 2405.18979), eq. 4-6; repository Renchunzi-Xie/MaNo.
    """
    rows = logits.double()
    q = rows.softmax(-1) if from_uniform(rows) > SOFTMAX_ABOVE else taylor(rows)
    return q.pow(4).mean().item() ** 0.25


def mean_confidence(logits: Logits) -> float:
    """Mean of the largest probability (arXiv 1610.02136), an estimate of accuracy in [0, 1]."""
    return CONFIDENCES["max probability"](logits).mean().item()


def certainty(logits: Logits) -> float:
    """`1 - H / log C`, the mean entropy turned so that it rises with accuracy; in [0, 1], but no accuracy."""
    return 1 + CONFIDENCES["entropy"](logits).mean().item() / math.log(max(logits.shape[-1], 2))


def threshold(
    logits: Logits, val_logits: Float[Tensor, "m C"], val_y: Int64[Tensor, " m"], score: str = "entropy"
) -> float:
    """Share of images above the confidence that as many validation images exceed as are right (ATC); in [0, 1].

    `score` is one of `CONFIDENCES`; the paper's best is the negative entropy. A validation accuracy of 1 gives 1.
    Source: arXiv 2201.04234, eq. 4.
    """
    wrong = int((~metrics.correct(val_logits, val_y)).sum())
    order = CONFIDENCES[score](val_logits).double().sort().values
    level = order[wrong - 1].item() if wrong else -math.inf
    return (CONFIDENCES[score](logits).double() > level).double().mean().item()


def agreement(zero_shot: Logits, bias: Logits) -> float:
    """Share of images to which the zero-shot logits and the bias alone give the same class."""
    return (metrics.predictions(zero_shot) == metrics.predictions(bias)).double().mean().item()


ESTIMATES: dict[str, Callable[..., float]] = {
    "MaNo": mano,
    "mean confidence": mean_confidence,
    "ATC": threshold,
    "entropy": certainty,
    "agreement": agreement,
}
IS_ACCURACY = ("mean confidence", "ATC")  # estimates of its size; the others only rise with it
