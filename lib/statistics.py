"""Statistics: what a difference is worth. Intervals, paired tests, ranks, Shapley shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Bool
from scipy import stats
from torch import Tensor


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
