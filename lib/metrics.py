"""Metrics: accuracy, calibration, and how two sets of logits complement each other.

Accuracies are fractions in [0, 1]; notebooks turn them into percent where they are shown.
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
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from torch import Tensor


def predictions(logits: Float[Tensor, "n C"], classes: Int64[Tensor, " c"] | None = None) -> Int64[Tensor, " n"]:
    """Class with the largest logit of each row, among `classes` only where they are given.

    Raises:
        ValueError: a row holds NaN (argmax would predict that class).
    """
    if torch.isnan(logits).any():
        raise ValueError(f"{int(torch.isnan(logits).any(dim=1).sum())} of {len(logits)} rows of logits hold NaN")
    return logits.argmax(dim=1) if classes is None else classes[logits[:, classes].argmax(dim=1)]


def correct(
    logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"], classes: Int64[Tensor, " c"] | None = None
) -> Bool[Tensor, " n"]:
    """Boolean mask of correct predictions; False where y is -1, an image of none of the classes."""
    return predictions(logits, classes) == y


def accuracy(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"], classes: Int64[Tensor, " c"] | None = None) -> float:
    """Fraction of correct predictions, rows with y = -1 left out; NaN without rows."""
    hits = correct(logits, y, classes)[y >= 0]
    return int(hits.sum()) / len(hits) if len(hits) else math.nan


def class_accuracy(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> Float[Tensor, " C"]:
    """Accuracy on each class, rows with y = -1 left out; NaN for a class without images."""
    return class_means(correct(logits, y)[y >= 0].float(), y[y >= 0], logits.shape[1])


def class_means(values: Float[Tensor, "n ..."], y: Int64[Tensor, " n"], num_classes: int) -> Float[Tensor, "C ..."]:
    """Mean of the rows of each class; NaN for a class without rows."""
    sums = torch.zeros(num_classes, *values.shape[1:], dtype=values.dtype).index_add_(0, y, values)
    counts = torch.bincount(y, minlength=num_classes)
    return sums / counts.view(-1, *[1] * (values.ndim - 1))


def calibration_error(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"], bins: int = 15) -> float:
    """Expected calibration error of softmax(logits), in [0, 1]."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    return multiclass_calibration_error(logits.softmax(1), y, logits.shape[1], n_bins=bins).item()


def brier(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> float:
    """Mean squared distance of softmax(logits) to the one-hot label, in [0, 2]."""
    return (logits.softmax(1) - torch.nn.functional.one_hot(y, logits.shape[1])).pow(2).sum(1).mean().item()


def reliability(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"], bins: int = 15) -> pd.DataFrame:
    """Mean `confidence` and `accuracy` in equal-width bins of the largest probability; empty bins are left out."""
    top = logits.softmax(1).amax(1).clamp_max(1).double().numpy()  # rounding may exceed 1
    accuracy, confidence = calibration_curve(correct(logits, y).numpy(), top, n_bins=bins)
    return pd.DataFrame({"confidence": confidence, "accuracy": accuracy})


def error_auroc(uncertainty: Float[Tensor, " n"], logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> float:
    """AUROC of the uncertainty as a detector of errors; 0.5 is chance; NaN without errors."""
    wrong = (~correct(logits, y)).numpy()
    if wrong.all() or not wrong.any():
        return math.nan
    return float(roc_auc_score(wrong, uncertainty.double().numpy()))


def error_auroc_interval(
    uncertainty: Float[Tensor, " n"], logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"], level: float = 0.95
) -> tuple[float, float]:
    """`error_auroc` and the half-width of its normal interval over images; NaN with fewer than 2 of either kind.

    With V the fraction of correct images below each wrong one, and W of wrong images above each correct one,
    the variance is var(V) / #wrong + var(W) / #correct        (DeLong et al., 1988)
    """
    wrong, value = (~correct(logits, y)).numpy(), uncertainty.double().numpy()
    if min(wrong.sum(), (~wrong).sum()) < 2:
        return error_auroc(uncertainty, logits, y), math.nan
    rank, rank_inside = stats.rankdata(value), np.empty(len(value))
    for part in (wrong, ~wrong):
        rank_inside[part] = stats.rankdata(value[part])
    fractions = [(rank - rank_inside)[part] / (~part).sum() for part in (wrong, ~wrong)]
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt(sum(v.var(ddof=1) / len(v) for v in fractions))
    return float(fractions[0].mean()), float(half)


def quantile_groups(values: Float[Tensor, " n"], groups: int) -> Int64[Tensor, " n"]:
    """Which of `groups` equally large parts each row falls in, 0 for the lowest values; ties by row."""
    rank = pd.Series(values.numpy()).rank(method="first")
    return torch.tensor(pd.qcut(rank, groups, labels=False).to_numpy(), dtype=torch.int64)


def image_complementarity(
    zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], centred: bool = False
) -> Float[Tensor, " n"]:
    """`1 - cosine(s0, bias)` of each image, in [0, 2].

    Args:
        centred: take each row's mean away first, which makes it 1 - correlation and blind to a common offset.
            The zero-shot logits of CLIP share a large one (cosines are all near 0.2), the paper keeps it.
    """
    if centred:
        zero_shot, bias = (v - v.mean(dim=1, keepdim=True) for v in (zero_shot, bias))
    return 1 - torch.nn.functional.cosine_similarity(zero_shot, bias, dim=1)


def complementarity(zero_shot: Float[Tensor, "n C"], bias: Float[Tensor, "n C"], centred: bool = False) -> float:
    """Mean of `image_complementarity`, the paper's CMY (AMU-Tuning, section 3.2)."""
    return image_complementarity(zero_shot, bias, centred).mean().item()


def overlap(first: Bool[Tensor, " n"], second: Bool[Tensor, " n"]) -> dict[str, float]:
    """How the correct predictions of two classifiers fall together, as fractions of all images.

    Returns:
        `both`, `first_only`, `second_only`, `neither` (correct), summing to 1; `oracle_gain`, what a perfect choice
        between the two would add to the better one; `disagreement`, the fraction of errors of the first on which the
        second is correct (NaN without errors of the first).
    """
    masks = {"both": first & second, "first_only": first & ~second, "second_only": second & ~first}
    fractions = {name: mask.float().mean().item() for name, mask in (masks | {"neither": ~(first | second)}).items()}
    fractions["oracle_gain"] = min(fractions["first_only"], fractions["second_only"])
    errors = fractions["second_only"] + fractions["neither"]
    fractions["disagreement"] = fractions["second_only"] / errors if errors else math.nan
    return fractions


def top_of_both(superiority: pd.Series, complementarity: pd.Series) -> str:
    """Name that the paper's rule picks: in the top K of one and the top K of the other measure.

    The paper leaves K open. Here it is the smallest K whose two lists share a name; of two names, which can only meet
    there together, the one of the higher superiority is taken.

    Source: AMU-Tuning, section 3.2.
    """
    ranks = [v.rank(ascending=False, method="first") for v in (superiority, complementarity)]
    worse = pd.concat(ranks, axis=1).max(axis=1)
    tied = worse.index[worse == worse.min()]
    return str(superiority[tied].idxmax())


def middle_of_best(scores: Float[Tensor, "*b G"]) -> Int64[Tensor, "*b"]:
    """Index of the best score of each row; of equal ones the middle (of an even number the lower middle).

    A few hundred validation images leave whole ranges of beta equal; the first of them would always be the smallest.
    """
    best = scores == scores.amax(dim=-1, keepdim=True)
    middle = (best.sum(dim=-1, keepdim=True) + 1) // 2
    return (best & (best.cumsum(dim=-1) == middle)).to(torch.uint8).argmax(dim=-1)


def repaired_and_broken(
    zero_shot: Float[Tensor, "n C"], fused: Float[Tensor, "n C"], y: Int64[Tensor, " n"]
) -> tuple[Int64[Tensor, " r"], Int64[Tensor, " b"]]:
    """Rows on which only the fused logits are correct, and those on which only the zero-shot logits are."""
    before, after = correct(zero_shot, y), correct(fused, y)
    return torch.nonzero(after & ~before)[:, 0], torch.nonzero(before & ~after)[:, 0]


def cka(first: Float[Tensor, "n D"], second: Float[Tensor, "n E"]) -> float:
    """Linear centred kernel alignment of two sets of features of the same images, in [0, 1].

    ||X'Y||^2 / (||X'X|| ||Y'Y||), X and Y centred        (Kornblith et al., 2019)
    """
    return float(cka_table({"first": first, "second": second}).loc["first", "second"])


def cka_table(spaces: Mapping[str, Float[Tensor, "n _"]]) -> pd.DataFrame:
    """`cka` of each pair of features of the same images, every product computed once."""
    centred = {name: v.double() - v.double().mean(dim=0) for name, v in spaces.items()}
    products = {(a, b): (centred[a].T @ centred[b]).norm() for a, b in combinations_with_replacement(spaces, 2)}
    table = pd.DataFrame(index=list(spaces), columns=list(spaces), dtype=float)
    for (one, other), product in products.items():
        alignment = product**2 / (products[one, one] * products[other, other])
        table.loc[one, other] = table.loc[other, one] = alignment.item()
    return table


def count_numbers(values: object) -> int:
    """How many numbers a tensor, or any nesting of lists of tensors, holds."""
    if isinstance(values, Tensor):
        return values.numel()
    return sum(count_numbers(value) for value in values)
