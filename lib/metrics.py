"""Metrics: accuracy (in [0, 1]), calibration, and how two sets of logits complement each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from scipy import special, stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, one_hot

Logits = Float[Tensor, "n C"]
Labels = Int64[Tensor, " n"]  # class index of each image; -1: an image of none of the classes
Classes = Int64[Tensor, " c"] | None  # predictions are an argmax over these alone (None: all)
Mask = Bool[Tensor, " n"]
Values = Sequence[float] | np.ndarray | pd.Series


def predictions(logits: Logits, classes: Classes = None) -> Labels:
    """Class with the largest logit of each row, -1 if `classes` are none; NaN, which argmax would pick, is refused."""
    if logits.sum().isnan() and (bad := int(logits.isnan().any(dim=1).sum())):  # one pass where all is well
        raise ValueError(f"{bad} of {len(logits)} rows of logits hold NaN")
    if classes is None:
        return logits.argmax(dim=1)
    return classes[logits[:, classes].argmax(dim=1)] if len(classes) else torch.full((len(logits),), -1)


def correct(logits: Logits, y: Labels, classes: Classes = None) -> Mask:
    """Boolean mask of correct predictions; False where y is -1."""
    return (predictions(logits, classes) == y) & (y >= 0)


def accuracy(logits: Logits, y: Labels, classes: Classes = None) -> float:
    """Fraction of correct predictions, rows with y = -1 left out; NaN without rows."""
    hits = correct(logits, y, classes)[y >= 0]
    return int(hits.sum()) / len(hits) if len(hits) else math.nan


def class_accuracy(logits: Logits, y: Labels, classes: Classes = None) -> Float[Tensor, " C"]:
    """Accuracy on each class, rows with y = -1 left out; NaN for a class without images."""
    return class_means(correct(logits, y, classes)[y >= 0].float(), y[y >= 0], logits.shape[1])


def balanced_accuracy(logits: Logits, y: Labels, classes: Classes = None) -> float:
    """Mean accuracy of the classes that have images, each of the same weight; NaN without rows."""
    return class_accuracy(logits, y, classes).nanmean().item()


def worst_class(logits: Logits, y: Labels, classes: Classes = None) -> float:
    """Lowest accuracy of the classes that have images; NaN without rows."""
    return worst_group(correct(logits, y, classes)[y >= 0], y[y >= 0])


def worst_group(hits: Mask, groups: Int64[Tensor, " n"]) -> float:
    """Lowest fraction of hits of the groups (numbers from 0) that have rows; NaN without rows."""
    accuracies = class_means(hits.float(), groups, int(groups.max()) + 1 if len(groups) else 0)
    return accuracies[~accuracies.isnan()].min().item() if len(accuracies) else math.nan


def robustness_line(accuracy: Values, shifted: Values) -> tuple[float, float]:
    """Slope and intercept of `logit(shifted) = intercept + slope logit(accuracy)`, by least squares over models.

    Accuracies, in distribution and under shift, are in [0, 1]; NaN where fewer than two of the first differ.
    Source: Taori et al., "Measuring robustness to natural distribution shifts" (arXiv 2007.00644), section 2.
    """
    x, y = _logit(accuracy), _logit(shifted)
    return tuple(map(float, np.polyfit(x, y, 1))) if np.ptp(x) > 0 else (math.nan, math.nan)


def effective_robustness(accuracy: Values, shifted: Values, line: tuple[float, float]) -> np.ndarray:
    """Accuracy under shift beyond what `robustness_line` gives for the accuracy in distribution, in [-1, 1]."""
    slope, intercept = line
    return np.asarray(shifted, dtype=float) - special.expit(intercept + slope * _logit(accuracy))


def _logit(accuracy: Values) -> np.ndarray:
    """log(p / (1 - p)); 0 and 1 have none and are taken as 0.001 and 0.999."""
    return special.logit(np.clip(np.asarray(accuracy, dtype=float), 1e-3, 1 - 1e-3))


def class_means(values: Float[Tensor, "n ..."], y: Labels, num_classes: int) -> Float[Tensor, "C ..."]:
    """Mean of the rows of each class; NaN for a class without rows."""
    sums = torch.zeros(num_classes, *values.shape[1:], dtype=values.dtype).index_add_(0, y, values)
    counts = torch.bincount(y, minlength=num_classes)
    return sums / counts.view(-1, *[1] * (values.ndim - 1))


def calibration_error(logits: Logits, y: Labels, bins: int = 15) -> float:
    """Expected calibration error of softmax(logits), in [0, 1]."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    return multiclass_calibration_error(logits.softmax(1), y, logits.shape[1], n_bins=bins).item()


def brier(logits: Logits, y: Labels) -> float:
    """Mean squared distance of softmax(logits) to the one-hot label, in [0, 2]."""
    return (logits.softmax(1) - one_hot(y, logits.shape[1])).pow(2).sum(1).mean().item()


def calibration(logits: Logits, y: Labels, bins: int = 15) -> dict[str, float]:
    """`accuracy`, mean `confidence`, their `gap` (confidence - accuracy), `ece` and `brier` in [0, 1], and `nll`.

    NLL is the mean cross-entropy in nats. Every y is a class: images of none have no probability to judge.
    """
    sure, right = logits.softmax(1).amax(1).double().mean().item(), accuracy(logits, y)
    measured = {"accuracy": right, "confidence": sure, "gap": sure - right}
    nll = cross_entropy(logits.double(), y).item()
    return measured | {"ece": calibration_error(logits, y, bins), "brier": brier(logits, y), "nll": nll}


def reliability(logits: Logits, y: Labels, bins: int = 15) -> pd.DataFrame:
    """Mean `confidence` and `accuracy` in equal-width bins of the largest probability; empty bins are left out."""
    top = logits.softmax(1).amax(1).clamp_max(1).double().numpy()  # rounding may exceed 1
    fraction, confidence = calibration_curve(correct(logits, y).numpy(), top, n_bins=bins)
    return pd.DataFrame({"confidence": confidence, "accuracy": fraction})


def auroc(high: Float[Tensor, " n"], low: Float[Tensor, " m"]) -> float:
    """Chance that a value of `high` exceeds one of `low`, ties one half; NaN without either."""
    if not len(high) or not len(low):
        return math.nan
    label = np.repeat([True, False], [len(high), len(low)])
    return float(roc_auc_score(label, torch.cat([high, low]).double().numpy()))


def auroc_interval(high: Float[Tensor, " n"], low: Float[Tensor, " m"]) -> tuple[float, float]:
    """`auroc` and the half-width of its normal 95 % interval over both sets; NaN with fewer than 2 of either.

    Its variance is var(V) / n + var(W) / m, with V the fraction of `low` below each of `high`, and W that of `high`
    above each of `low` (DeLong et al., 1988).
    """
    if min(len(high), len(low)) < 2:
        return auroc(high, low), math.nan
    parts = [part.double().numpy() for part in (high, low)]
    rank = np.split(stats.rankdata(np.concatenate(parts)), [len(high)])
    v, w = ((r - stats.rankdata(p)) / (len(high) + len(low) - len(p)) for r, p in zip(rank, parts, strict=True))
    return float(v.mean()), float(stats.norm.ppf(0.975) * np.hypot(stats.sem(v), stats.sem(w)))


def error_auroc(uncertainty: Float[Tensor, " n"], logits: Logits, y: Labels) -> float:
    """AUROC of the uncertainty as a detector of errors; 0.5 is chance; NaN without errors."""
    return auroc(*_wrong_and_right(uncertainty, logits, y))


def error_auroc_interval(uncertainty: Float[Tensor, " n"], logits: Logits, y: Labels) -> tuple[float, float]:
    """`error_auroc` and the half-width of its interval over images, see `auroc_interval`."""
    return auroc_interval(*_wrong_and_right(uncertainty, logits, y))


def _wrong_and_right(uncertainty: Tensor, logits: Logits, y: Labels) -> tuple[Tensor, Tensor]:
    hits = correct(logits, y)
    return uncertainty[~hits], uncertainty[hits]


def quantile_groups(values: Float[Tensor, " n"], groups: int) -> Int64[Tensor, " n"]:
    """Which of `groups` equally large parts each row falls in, 0 for the lowest values; ties by row."""
    rank = pd.Series(values.numpy()).rank(method="first")
    return torch.tensor(pd.qcut(rank, groups, labels=False).to_numpy(), dtype=torch.int64)


def image_complementarity(zero_shot: Logits, bias: Logits, centred: bool = False) -> Float[Tensor, " n"]:
    """`1 - cosine(s0, bias)` of each image, in [0, 2]; `centred`: 1 - correlation, blind to a common offset of a row.

    The zero-shot logits of CLIP share a large one (cosines are all near 0.2); the paper keeps it.
    """
    if centred:
        zero_shot, bias = (logits - logits.mean(dim=1, keepdim=True) for logits in (zero_shot, bias))
    return 1 - cosine_similarity(zero_shot, bias, dim=1)


def complementarity(zero_shot: Logits, bias: Logits, centred: bool = False) -> float:
    """Mean of `image_complementarity`, the paper's CMY (AMU-Tuning, section 3.2)."""
    return image_complementarity(zero_shot, bias, centred).mean().item()


def overlap(first: Mask, second: Mask) -> dict[str, float]:
    """Fractions of images on which `both`, `first_only`, `second_only` or `neither` of two classifiers is correct.

    Also `oracle_gain`, what a perfect choice between the two would add to the better one, and `disagreement`, the
    fraction of errors of the first on which the second is correct (NaN without errors of the first).
    """
    masks = {"both": first & second, "first_only": first & ~second, "second_only": ~first & second}
    masks["neither"] = ~(first | second)
    fractions = {name: mask.float().mean().item() for name, mask in masks.items()}
    fractions["oracle_gain"] = min(fractions["first_only"], fractions["second_only"])
    fractions["disagreement"] = second[~first].float().mean().item()
    return fractions


def top_of_both(superiority: pd.Series, complementarity: pd.Series) -> str:
    """Name in the top K of one and the top K of the other measure, the rule of AMU-Tuning, section 3.2.

    The paper leaves K open. Here it is the smallest K whose two lists share a name; of two names, which can only meet
    there together, the one of the higher superiority is taken.
    """
    ranks = [v.rank(ascending=False, method="first") for v in (superiority, complementarity)]
    worse = pd.concat(ranks, axis=1).max(axis=1)
    return str(superiority[worse == worse.min()].idxmax())


def middle_of_best(scores: Float[Tensor, "*b G"]) -> Int64[Tensor, "*b"]:
    """Index of the best score of each row; of equal ones the middle (of an even number the lower middle).

    A few hundred validation images leave whole ranges of beta equal; the first of them would always be the smallest.
    """
    best = scores == scores.amax(dim=-1, keepdim=True)
    middle = (best.sum(dim=-1, keepdim=True) + 1) // 2
    return (best & (best.cumsum(dim=-1) == middle)).to(torch.uint8).argmax(dim=-1)


def repaired_and_broken(
    zero_shot: Logits, fused: Logits, y: Labels, classes: Classes = None
) -> tuple[Int64[Tensor, " r"], Int64[Tensor, " b"]]:
    """Rows on which only the fused logits are correct, and those on which only the zero-shot logits are."""
    before, after = correct(zero_shot, y, classes), correct(fused, y, classes)
    return torch.nonzero(after & ~before)[:, 0], torch.nonzero(before & ~after)[:, 0]


def cka(first: Float[Tensor, "n D"], second: Float[Tensor, "n E"]) -> float:
    """Linear centred kernel alignment of two sets of features of the same images, in [0, 1] (Kornblith et al., 2019).

    ||X'Y||^2 / (||X'X|| ||Y'Y||), X and Y centred
    """
    return float(cka_table({"first": first, "second": second}).loc["first", "second"])


def cka_table(spaces: Mapping[str, Float[Tensor, "n _"]]) -> pd.DataFrame:
    """`cka` of each pair of features of the same images, every product computed once."""
    centred = {name: v.double() - v.double().mean(dim=0) for name, v in spaces.items()}
    norms = pd.DataFrame(index=list(spaces), columns=list(spaces), dtype=float)
    for one, other in combinations_with_replacement(spaces, 2):
        norms.loc[one, other] = norms.loc[other, one] = (centred[one].T @ centred[other]).norm().item()
    return norms**2 / np.outer(np.diag(norms), np.diag(norms))


def count_numbers(values: object) -> int:
    """How many numbers a tensor, or any nesting of lists of tensors, holds."""
    if isinstance(values, Tensor):
        return values.numel()
    return sum(count_numbers(value) for value in values)
