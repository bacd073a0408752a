"""Metrics: accuracy, calibration, how two sets of logits complement each other, and what a difference is worth.

Accuracies are shares in [0, 1]; notebooks turn them into percent where they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from scipy import stats
from torch import Tensor



def correct(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Tell which rows are classified correctly.

    Raises:
        ValueError: a row holds NaN, which argmax would count as a vote for that class.
    """
    if torch.isnan(logits).any():
        raise ValueError(f"{int(torch.isnan(logits).any(dim=1).sum())} of {len(logits)} rows of logits hold NaN")
    return logits.argmax(dim=1) == y


def accuracy(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> float:
    """Return the share of rows classified correctly, in [0, 1]."""
    return correct(logits, y).float().mean().item()


def class_accuracy(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> Float[Tensor, " C"]:
    """Return the accuracy on each class; NaN for a class without images."""
    return class_means(correct(logits, y).float(), y, logits.shape[1])


def class_means(
    values: Float[Tensor, "n *d"], y: Int64[Tensor, " n"], num_classes: int
) -> Float[Tensor, "C *d"]:
    """Mean of the rows of each class; NaN for a class without rows."""
    sums = torch.zeros(num_classes, *values.shape[1:], dtype=values.dtype).index_add_(0, y, values)
    counts = torch.bincount(y, minlength=num_classes)
    return sums / counts.view(-1, *[1] * (values.ndim - 1))


# --- calibration -----------------------------------------------------------------------------------------------


def calibration_error(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"], bins: int = 15) -> float:
    """Return the expected calibration error of softmax(logits), in [0, 1]."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    return multiclass_calibration_error(logits.softmax(1), y, logits.shape[1], n_bins=bins).item()


def brier(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> float:
    """Return the mean squared distance of softmax(logits) to the one-hot label, in [0, 2]."""
    hot = torch.nn.functional.one_hot(y, logits.shape[1])
    return (logits.softmax(1) - hot).pow(2).sum(1).mean().item()


def reliability(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"], bins: int = 15) -> pd.DataFrame:
    """Return confidence, accuracy and count in equal-width bins of the largest probability; empty bins are left out."""
    sure = logits.softmax(1).amax(1).double().numpy()
    hit = correct(logits, y).numpy()
    place = np.minimum((sure * bins).astype(int), bins - 1)
    table = pd.DataFrame({"bin": place, "confidence": sure, "accuracy": hit.astype(float)})
    return table.groupby("bin").agg(
        confidence=("confidence", "mean"), accuracy=("accuracy", "mean"), count=("accuracy", "size")
    )


def error_auroc(uncertainty: Float[Tensor, " n"], logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> float:
    """Return the chance that a wrong image is more uncertain than a right one; 0.5 knows nothing, NaN if none errs."""
    wrong = (~correct(logits, y)).numpy()
    if wrong.all() or not wrong.any():
        return math.nan
    ranks = stats.rankdata(uncertainty.double().numpy())
    below = ranks[wrong].sum() - wrong.sum() * (wrong.sum() + 1) / 2
    return float(below / (wrong.sum() * (~wrong).sum()))


def error_auroc_interval(
    uncertainty: Float[Tensor, " n"], logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"], level: float = 0.95
) -> tuple[float, float]:
    """Return `error_auroc` and the half-width of its normal interval over images.

    With V the share of right images that a wrong one is above, and W the same the other way round, the variance is
    var(V) / #wrong + var(W) / #right        (DeLong et al., 1988)
    """
    wrong, value = (~correct(logits, y)).numpy(), uncertainty.double().numpy()
    if min(wrong.sum(), (~wrong).sum()) < 2:
        return error_auroc(uncertainty, logits, y), math.nan
    place, own = stats.rankdata(value), np.empty(len(value))
    for part in (wrong, ~wrong):
        own[part] = stats.rankdata(value[part])
    shares = [(place - own)[part] / (~part).sum() for part in (wrong, ~wrong)]
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt(sum(v.var(ddof=1) / len(v) for v in shares))
    return float(shares[0].mean()), float(half)


def quantile_groups(values: Float[Tensor, " n"], groups: int) -> Int64[Tensor, " n"]:
    """Return which of `groups` equally large parts, from the lowest values (0) up, each row falls in; ties by row."""
    place = torch.empty(len(values), dtype=torch.int64)
    place[torch.argsort(values, stable=True)] = torch.arange(len(values))
    return place * groups // len(values)


# --- complementarity -------------------------------------------------------------------------------------------


def image_complementarity(
    zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], centred: bool = False
) -> Float[Tensor, " n"]:
    """Return `1 - cosine(s0, bias)` of each image, in [0, 2].

    Args:
        centred: take each row's mean away first, which makes it 1 - correlation and blind to a common offset.
            The zero-shot logits of CLIP share a large one (cosines are all near 0.2), the paper keeps it.
    """
    if centred:
        zero_shot, bias = (v - v.mean(dim=1, keepdim=True) for v in (zero_shot, bias))
    return 1 - torch.nn.functional.cosine_similarity(zero_shot, bias, dim=1)


def complementarity(zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], centred: bool = False) -> float:
    """Return the mean of `image_complementarity`, the paper's CMY (AMU-Tuning, section 3.2)."""
    return image_complementarity(zero_shot, bias, centred).mean().item()


def overlap(first: Bool[Tensor, " n"], second: Bool[Tensor, " n"]) -> dict[str, float]:
    """Return how the errors of two classifiers fall together, as shares of all images.

    Returns:
        `both`, `first_only`, `second_only`, `neither` (right), summing to 1; `oracle_gain`, what a perfect chooser
        between the two would add to the better one; `disagreement`, the share of errors of the first that the second
        gets right (NaN if the first never errs).
    """
    both, one, two = (first & second), (first & ~second), (second & ~first)
    shares = {"both": both, "first_only": one, "second_only": two, "neither": ~(first | second)}
    found = {name: mask.float().mean().item() for name, mask in shares.items()}
    found["oracle_gain"] = min(found["first_only"], found["second_only"])
    errors = found["second_only"] + found["neither"]
    found["disagreement"] = found["second_only"] / errors if errors else math.nan
    return found


def top_of_both(superiority: pd.Series, complementarity: pd.Series) -> str:
    """Return the name that the paper's rule picks: in the top K of one and the top K of the other measure.

    The paper leaves K open. Here it is the smallest K whose two lists share a name; of two names, which can only meet
    there together, the one of the higher superiority is taken.

    Source: AMU-Tuning, section 3.2.
    """
    ranks = [v.rank(ascending=False, method="first") for v in (superiority, complementarity)]
    worse = pd.concat(ranks, axis=1).max(axis=1)
    tied = worse.index[worse == worse.min()]
    return str(superiority[tied].idxmax())


def middle_of_best(scores: Float[Tensor, "*b G"]) -> Int64[Tensor, "*b"]:
    """Return the index of the best score of each row, of equals the middle one.

    A few hundred validation images leave whole ranges of beta equal; the first of them would always be the smallest.
    """
    best = scores == scores.amax(dim=-1, keepdim=True)
    middle = (best.sum(dim=-1, keepdim=True) + 1) // 2
    return (best & (best.cumsum(dim=-1) == middle)).to(torch.uint8).argmax(dim=-1)


def repaired_and_broken(
    zero_shot: Float[Tensor, "n C"], fused: Float[Tensor, "n C"], y: Int64[Tensor, " n"]
) -> tuple[Int64[Tensor, " r"], Int64[Tensor, " b"]]:
    """Return the rows that only the fused logits get right, and those that only the zero-shot logits do."""
    before, after = correct(zero_shot, y), correct(fused, y)
    return torch.nonzero(after & ~before)[:, 0], torch.nonzero(before & ~after)[:, 0]


def cka(first: Float[Tensor, "n D"], second: Float[Tensor, "n E"]) -> float:
    """Return linear centred kernel alignment of two sets of features of the same images, in [0, 1].

    ||X'Y||^2 / (||X'X|| ||Y'Y||), X and Y centred        (Kornblith et al., 2019)
    """
    return float(cka_table({"first": first, "second": second}).loc["first", "second"])


def cka_table(spaces: Mapping[str, Float[Tensor, "n _"]]) -> pd.DataFrame:
    """Return `cka` of each pair of features of the same images, every product computed once."""
    centred = {name: v.double() - v.double().mean(dim=0) for name, v in spaces.items()}
    products = {
        pair: (centred[pair[0]].T @ centred[pair[1]]).norm() for pair in combinations_with_replacement(spaces, 2)
    }
    table = pd.DataFrame(index=list(spaces), columns=list(spaces), dtype=float)
    for (one, other), product in products.items():
        alike = product**2 / (products[one, one] * products[other, other])
        table.loc[one, other] = table.loc[other, one] = alike.item()
    return table


def count_numbers(values: object) -> int:
    """Return how many numbers a tensor, or any nesting of lists of tensors, holds."""
    if isinstance(values, Tensor):
        return values.numel()
    return sum(count_numbers(value) for value in values)
