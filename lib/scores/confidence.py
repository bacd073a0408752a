"""How sure a row of logits is, what abstaining by it brings, and how probabilities are put right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lib import fusion, metrics
from lib.metrics import Labels, Logits, Mask

Confidence = Float[Tensor, " n"]  # more is surer
CENTRES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.zeros_like,
    "mean": lambda z: z.mean(-1, keepdim=True),
    "min": lambda z: z.amin(-1, keepdim=True),
}


def logit_norm(logits: Logits, p: int | float = 4, centre: str = "mean") -> Float[Tensor, " n"]:
    """`max_c z_c / ||z||_p` of each row in float64, z the logits minus their `mean`, their `min` or nothing (`none`).

    p = 0 counts the entries that are not zero. Free of the logits' scale if p > 0, of a common offset unless the centre
    is `none`; a row that is constant gives 0.
    Source: arXiv 2403.14715, section 4; repository ENSTA-U2IS-AI/Label-smoothing-Selective-classification-Code.
    """
    if centre not in CENTRES:
        raise ValueError(f"centre is one of {', '.join(CENTRES)}, not {centre!r}")
    if p < 0:
        raise ValueError(f"p is 0 or more, not {p}")
    z = logits.double()
    z = z - CENTRES[centre](z)
    norm = torch.linalg.vector_norm(z, p, dim=-1)
    return torch.where(norm > 0, z.amax(-1) / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)


def margin(values: Logits) -> Float[Tensor, " n"]:
    """Largest minus second largest entry of each row; 0 where there is one class."""
    two = values.topk(min(2, values.shape[-1]), dim=-1).values
    return two[:, 0] - two[:, -1]


# More is surer. The order in which `logit norm` and `kurtosis` put images does not depend on the scale of the logits.
CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "max probability": lambda logits: logits.softmax(-1).amax(-1),  # MSP (arXiv 1610.02136)
    "margin": lambda logits: margin(logits.softmax(-1)),  # of the two largest probabilities
    "margin of logits": margin,
    "entropy": lambda logits: -torch.special.entr(logits.softmax(-1)).sum(-1),  # negative: more is surer
    "energy": lambda logits: logits.logsumexp(-1),
    "max logit": lambda logits: logits.amax(-1),
    "kurtosis": lambda logits: fusion.kurtosis(logits) if logits.shape[-1] > 1 else torch.zeros(len(logits)),
    "logit norm": logit_norm,
}


def risk_coverage(confidence: Confidence, correct: Mask) -> Float[Tensor, " n"]:
    """Selective risk at coverages 1/n, 2/n, …, 1: the error rate of the k surest images, in [0, 1].

    Equal confidences cannot be told apart: the k-th of them carries the mean error of all, so the order of the rows
    never counts.
    """
    if confidence.isnan().any():
        raise ValueError(f"{int(confidence.isnan().sum())} of {len(confidence)} confidences are NaN")
    _, place = confidence.neg().unique(return_inverse=True)  # 0: the surest
    wrong = metrics.class_means((~correct).double(), place, int(place.max()) + 1 if len(place) else 0)
    errors = wrong[place.sort().values].cumsum(0)
    return errors / torch.arange(1, len(errors) + 1)


def aurc(confidence: Confidence, correct: Mask) -> float:
    """Area under the risk-coverage curve, the mean selective risk over all coverages; NaN without images.

    `aurc(correct.double(), correct)` is the least that a ranking of these images can have, and the error rate is what
    no ranking at all has. Others take trapezoids, with a point (0, 0) or without; the three differ by about 1/n.
    """
    return risk_coverage(confidence, correct).mean().item()


def norm_power(logits: Logits, y: Labels, powers: Sequence[float] = tuple(range(1, 11)), centre: str = "mean") -> float:
    """The p of `logit_norm` with the least AURC on labelled images; of equal ones the middle."""
    hits = metrics.correct(logits, y)
    risks = torch.tensor([aurc(logit_norm(logits, p, centre), hits) for p in powers], dtype=torch.float64)
    return float(powers[int(metrics.middle_of_best(-risks))])


def temperature(logits: Logits, y: Labels, least: float = 0.01) -> float:
    """The T >= `least` that minimises the cross-entropy of `logits / T`; infinite where no T beats uniform.

    The loss is convex in 1/T, so this is its optimum, which the field's 50 steps of L-BFGS from 1.5 do not reach. Where
    every image is right the loss falls down to `least`.
    Source: arXiv 1706.04599.
    """
    scale = fusion.learn_beta(torch.zeros_like(logits), logits, y, 1 / least)
    return 1 / scale if scale > 0 else math.inf


def conformal_sets(
    val_logits: Float[Tensor, "m C"], val_y: Int64[Tensor, " m"], logits: Logits, coverage: float = 0.9
) -> Bool[Tensor, "n C"]:
    """Mask of the classes in each image's prediction set, which holds the truth with at least this probability.

        {c : p_c >= 1 - q},    q the ceil((m + 1) coverage)-th smallest of the m scores 1 - p_y

    This holds over images exchangeable with the m of validation, on which nothing else was chosen. With too few of them
    (m + 1 < 1 / (1 - coverage)) every class is in every set.
    Source: split conformal prediction with the threshold score (Sadinle et al., arXiv 1609.00451).
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage lies between 0 and 1, not {coverage}")
    scores = 1 - val_logits.double().softmax(-1).gather(1, val_y[:, None])[:, 0]
    rank = math.ceil((len(scores) + 1) * coverage)
    q = np.inf if rank > len(scores) else scores.sort().values[rank - 1].item()
    return 1 - logits.double().softmax(-1) <= q
