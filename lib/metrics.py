"""Metrics: accuracy, calibration, how two sets of logits complement each other, and what a difference is worth.

Accuracies are shares in [0, 1]; notebooks turn them into percent where they are shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, combinations_with_replacement

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from scipy import stats
from torch import Tensor

from lib import fusion
from lib.tasks import Split


def right(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Tell which rows are classified correctly.

    Raises:
        ValueError: a row holds NaN, which argmax would count as a vote for that class.
    """
    if torch.isnan(logits).any():
        raise ValueError(f"{int(torch.isnan(logits).any(dim=1).sum())} of {len(logits)} rows of logits hold NaN")
    return logits.argmax(dim=1) == y


def accuracy(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> float:
    """Return the share of rows classified correctly, in [0, 1]."""
    return right(logits, y).float().mean().item()


def class_accuracy(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> Float[Tensor, " C"]:
    """Return the accuracy on each class; NaN for a class without images."""
    return class_means(right(logits, y).float(), y, logits.shape[1])


def class_means(values: Float[Tensor, " n"], y: Int64[Tensor, " n"], classes: int) -> Float[Tensor, " C"]:
    """Return the mean of a per-image value over each class; NaN for a class without images."""
    counts = torch.bincount(y, minlength=classes)
    return torch.zeros(classes, dtype=values.dtype).index_add_(0, y, values) / counts


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
    hit = right(logits, y).numpy()
    place = np.minimum((sure * bins).astype(int), bins - 1)
    table = pd.DataFrame({"bin": place, "confidence": sure, "accuracy": hit.astype(float)})
    return table.groupby("bin").agg(
        confidence=("confidence", "mean"), accuracy=("accuracy", "mean"), count=("accuracy", "size")
    )


def error_auroc(uncertainty: Float[Tensor, " n"], logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> float:
    """Return the chance that a wrong image is more uncertain than a right one; 0.5 knows nothing, NaN if none errs."""
    wrong = (~right(logits, y)).numpy()
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
    wrong, value = (~right(logits, y)).numpy(), uncertainty.double().numpy()
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
    before, after = right(zero_shot, y), right(fused, y)
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


def shapley(value: Callable[[frozenset[str]], float], players: Sequence[str]) -> dict[str, float]:
    """Return each player's share of `value(all) - value(none)`: its marginal gain averaged over all orders.

    Args:
        value: the worth of a coalition, the accuracy of a method in which only these parts are switched on.
    """
    n, worth = len(players), {}
    for size in range(n + 1):
        worth |= {frozenset(c): value(frozenset(c)) for c in combinations(players, size)}
    shares = {}
    for player in players:
        others = [p for p in players if p != player]
        shares[player] = sum(
            (worth[frozenset(c) | {player}] - worth[frozenset(c)])
            * math.factorial(size)
            * math.factorial(n - size - 1)
            / math.factorial(n)
            for size in range(n)
            for c in combinations(others, size)
        )
    return shares


# --- significance ----------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float] | np.ndarray | pd.Series, level: float = 0.95) -> tuple[float, float]:
    """Return the mean and the half-width of its t interval; the width of a single value is NaN."""
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return float(found.mean()), math.nan
    return float(found.mean()), float(stats.t.ppf((1 + level) / 2, len(found) - 1) * stats.sem(found))


def paired_bootstrap(
    first: Bool[Tensor, "s n"],
    second: Bool[Tensor, "s n"],
    generator: np.random.Generator,
    resamples: int = 2000,
    level: float = 0.95,
) -> dict[str, float]:
    """Compare two classifiers on the same images and seeds; images and seeds are both drawn again.

    Args:
        first, second: which images each gets right, one row per seed.

    Returns:
        `difference` of the accuracies (first - second), its interval `low`, `high`, and `p`, two-sided.
    """
    gap = first.float().numpy() - second.float().numpy()
    seeds, n = gap.shape
    draws = np.empty(resamples)
    for i in range(resamples):
        images = generator.integers(n, size=n)
        draws[i] = gap[generator.integers(seeds, size=seeds)].mean(axis=0)[images].mean()
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    p = min(1.0, 2 * (1 + min((draws <= 0).sum(), (draws >= 0).sum())) / (1 + resamples))
    return {"difference": float(gap.mean()), "low": float(low), "high": float(high), "p": float(p)}


def signed_rank_table(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Compare every column with one of them by Wilcoxon's signed-rank test, corrected by Holm for their number.

    Args:
        scores: one row per block (data set x shots x seed), one column per method.

    Returns:
        One row per other method: mean `difference` to the reference, `p`, `p_holm`, and `verdict` at 5 %:
        better, worse or tie.
    """
    rows = []
    for name in scores.columns.drop(reference):
        gap = (scores[name] - scores[reference]).dropna()
        p = 1.0 if (gap == 0).all() else float(stats.wilcoxon(gap).pvalue)
        rows.append({"method": name, "difference": gap.mean(), "p": p})
    table = pd.DataFrame(rows).set_index("method")
    table["p_holm"] = holm(table["p"].to_numpy())
    sure = table["p_holm"] < 0.05
    table["verdict"] = np.where(~sure, "tie", np.where(table["difference"] > 0, "better", "worse"))
    return table


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values corrected by Holm's step-down rule for the number of comparisons."""
    found = np.asarray(p, dtype=float)
    order = np.argsort(found)
    stepped = np.maximum.accumulate(found[order] * (len(found) - np.arange(len(found))))
    corrected = np.empty_like(found)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def mean_ranks(scores: pd.DataFrame, level: float = 0.95) -> tuple[pd.Series, float]:
    """Return each method's mean rank over the blocks (1 is best) and Nemenyi's critical difference.

    CD = q sqrt(k (k + 1) / (6 N)), q the studentised range over sqrt(2)        (Demsar, 2006)
    """
    blocks, k = scores.shape
    ranks = scores.rank(axis=1, ascending=False).mean()
    quantile = stats.studentized_range.ppf(level, k, np.inf) / math.sqrt(2)
    return ranks.sort_values(), float(quantile * math.sqrt(k * (k + 1) / (6 * blocks)))


def cliques(ranks: pd.Series, difference: float) -> list[tuple[str, ...]]:
    """Return the largest groups of methods whose mean ranks lie within the critical difference."""
    names = list(ranks.sort_values().index)
    groups = []
    for i, first in enumerate(names):
        group = tuple(name for name in names[i:] if ranks[name] - ranks[first] <= difference)
        if len(group) > 1 and (not groups or not set(group) <= set(groups[-1])):
            groups.append(group)
    return groups


# --- the workbook's own comparisons --------------------------------------------------------------------------------


def judge_fusions(
    rules: Mapping[str, fusion.Rule],
    held: Split,
    held_bias: Float[Tensor, "m C"],
    test: Split,
    test_bias: Float[Tensor, "n C"],
    betas: Sequence[float],
) -> pd.DataFrame:
    """Judge one fitted bias under many fusion rules; each takes its beta from the held-out images.

    A few held-out images leave many betas equal; the middle one of the best is taken, which favours no size of bias.

    Args:
        rules: functions of (zero_shot, bias, beta), of (zero_shot, bias), or `fusion.learned`, which learns its beta.
        held: the images on which beta is chosen, with the bias there.
        betas: the values to choose from.

    Returns:
        One row per rule: `beta` (NaN without one), the accuracies in [0, 1] `held` and `accuracy` (on `test`), and
        `right`, which test images it classifies correctly.
    """
    rows = []
    for name, rule in rules.items():
        if rule is fusion.replace:
            beta, score, fused = math.nan, accuracy(held_bias, held.y), test_bias
        else:
            tried = (fusion.learn_beta(held.zero_shot, held_bias, held.y),) if rule is fusion.learned else tuple(betas)
            found = fusion.accuracy_over_beta(rule, held.zero_shot, held_bias, held.y, tried)
            score = max(found)
            best = sorted(beta for beta, reached in zip(tried, found, strict=True) if reached == score)
            beta = best[len(best) // 2]
            fused = rule(test.zero_shot, test_bias, beta=beta)
        hit = right(fused, test.y)
        rows.append({"fusion": name, "beta": beta, "held": score, "accuracy": hit.float().mean().item(), "right": hit})
    return pd.DataFrame(rows).set_index("fusion")


def count_numbers(values: object) -> int:
    """Return how many numbers a tensor, or any nesting of lists of tensors, holds."""
    if isinstance(values, Tensor):
        return values.numel()
    return sum(count_numbers(value) for value in values)


def published_backbone(encoder: str) -> str:
    """Return the name under which tables publish one of OpenAI's image towers, `RN50` or `ViT-B/16`; else ``.

    An encoder's name counts (`open_clip:ViT-B-16-quickgelu/openai`) and so does a bank's file name (`clip_vit_b16`).
    """
    found = re.fullmatch(r"open_clip:(RN\d+|ViT-[BL]-\d+)(?:-quickgelu)?/openai", encoder)
    found = found or re.fullmatch(r"clip[_-](RN\d+|ViT[_-]?[BL][_-]?\d+)", encoder, re.IGNORECASE)
    if not found:
        return ""
    kind, size, patch = re.fullmatch(r"(RN|VIT)[_-]?([BL]?)[_-]?(\d+)", found[1].upper()).groups()
    return f"RN{patch}" if kind == "RN" else f"ViT-{size}/{patch}"


def join_published(ours: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Put our accuracies beside the published ones of the same method, data set, backbone and number of shots.

    Args:
        ours: one row per result: `method` (as titled in `methods.METHODS`), `dataset`, `backbone` (as published),
            `shots` and `mean`, in %.
        published: rows of data/published.csv. Zero-shot CLIP stands there at 0 shots and is compared at any.

    Returns:
        The rows that agree, with `value`, `source`, `table` and `difference` (ours - published, in points).
    """
    theirs = published[published["metric"] == "accuracy"].replace({"method": {"LP-CLIP": "Linear probe"}})
    theirs = theirs.astype({"shots": int})[["source", "table", "method", "dataset", "clip_backbone", "shots", "value"]]
    theirs = theirs.rename(columns={"clip_backbone": "backbone"})
    keys = ["method", "dataset", "backbone", "shots"]
    asked = ours.assign(shots_run=ours["shots"], shots=ours["shots"].where(ours["method"] != "Zero-shot CLIP", 0))
    joined = asked.merge(theirs, on=keys).assign(difference=lambda rows: rows["mean"] - rows["value"])
    return joined.assign(shots=joined["shots_run"]).drop(columns="shots_run")
