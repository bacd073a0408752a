"""Statistics: whether a difference exceeds chance. Intervals, paired tests, ranks, Shapley contributions."""

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
    """Mean and half-width of its t interval; the half-width of a single value is NaN."""
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return float(sample.mean()), math.nan
    return float(sample.mean()), float(stats.t.ppf((1 + level) / 2, len(sample) - 1) * stats.sem(sample))


def interval_table(results: pd.DataFrame) -> pd.DataFrame:
    """`mean` accuracy over seeds and `half`-width of its 95 % interval, in %, per `label` and number of `shots`.

    `results` has a row per seed with `label`, `shots` and `accuracy` in [0, 1]; one seed has half-width NaN.
    """
    rows = [
        (label, shots, *mean_interval(100 * group["accuracy"]))
        for (label, shots), group in results.groupby(["label", "shots"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["label", "shots", "mean", "half"])


def paired_bootstrap(
    first: Bool[Tensor, "s n"],
    second: Bool[Tensor, "s n"],
    generator: np.random.Generator,
    resamples: int = 2000,
    level: float = 0.95,
) -> dict[str, float]:
    """Difference of two classifiers on the same images and seeds; images and seeds are both resampled.

    Args:
        first, second: correct predictions of each, one row per seed.

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


def paired(first: Sequence[float] | pd.Series, second: Sequence[float] | pd.Series) -> dict[str, float]:
    """Mean difference first - second over seeds (`difference`), half-width of its 95 % t interval (`half`) and `p` of
    the paired t-test, two-sided; a single seed gives neither interval nor p (NaN).
    """
    gap = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    mean, half = mean_interval(gap)
    if len(gap) > 1 and np.ptp(gap) > 0:
        p = float(stats.ttest_1samp(gap, 0.0).pvalue)
    else:
        p = math.nan if len(gap) < 2 else float(mean == 0)  # one seed; or one difference in all
    return {"difference": mean, "half": half, "p": p}


def against(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Every column `paired` with one of them, corrected by Holm for their number.

    Args:
        scores: one row per seed (of one data set and number of shots), one column per method.

    Returns:
        One row per other column: `difference`, `half`, `p`, `p_holm`, `verdict` at 5 % (better, worse, tie; a dash with
        one seed) and `edge`, whether p_holm lies between 0.02 and 0.08, where the verdict may turn.
    """
    table = pd.DataFrame({name: paired(scores[name], scores[reference]) for name in scores.columns.drop(reference)}).T
    table["p_holm"] = holm(table["p"]) if table["p"].notna().all() else math.nan
    sign = np.where(table["difference"] > 0, "better", "worse")
    table["verdict"] = np.where(table["p"].isna(), "–", np.where(table["p_holm"] < 0.05, sign, "tie"))
    return table.assign(edge=table["p_holm"].between(0.02, 0.08))


def pm(mean: float, half: float, digits: int = 1, sign: bool = False) -> str:
    """A mean and its half-width as text, `62.4 ± 0.8`; a dash for what does not exist."""
    plus = "+" if sign else ""
    parts = [f"{mean:{plus}.{digits}f}", f"{half:.{digits}f}"]
    return " ± ".join(part if math.isfinite(x) else "–" for part, x in zip(parts, (mean, half), strict=True))


def signed_rank_table(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Comparison of every column with one of them by Wilcoxon's signed-rank test, corrected by Holm for their number.

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
    significant = table["p_holm"] < 0.05
    table["verdict"] = np.where(~significant, "tie", np.where(table["difference"] > 0, "better", "worse"))
    return table


def holm(p: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    """P-values corrected by Holm's step-down rule for the number of comparisons."""
    raw = np.asarray(p, dtype=float)
    order = np.argsort(raw)
    stepped = np.maximum.accumulate(raw[order] * (len(raw) - np.arange(len(raw))))
    corrected = np.empty_like(raw)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def mean_ranks(scores: pd.DataFrame, level: float = 0.95) -> tuple[pd.Series, float]:
    """Each method's mean rank over the blocks (1 is best), and Nemenyi's critical difference.

    CD = q sqrt(k (k + 1) / (6 N)), q the studentised range over sqrt(2)        (Demsar, 2006)
    """
    blocks, k = scores.shape
    ranks = scores.rank(axis=1, ascending=False).mean()
    quantile = stats.studentized_range.ppf(level, k, np.inf) / math.sqrt(2)
    return ranks.sort_values(), float(quantile * math.sqrt(k * (k + 1) / (6 * blocks)))


def cliques(ranks: pd.Series, difference: float) -> list[tuple[str, ...]]:
    """Largest groups of methods whose mean ranks lie within the critical difference."""
    names = list(ranks.sort_values().index)
    groups = []
    for i, first in enumerate(names):
        group = tuple(name for name in names[i:] if ranks[name] - ranks[first] <= difference)
        if len(group) > 1 and (not groups or not set(group) <= set(groups[-1])):
            groups.append(group)
    return groups


def shapley(value: Callable[[frozenset[str]], float], players: Sequence[str]) -> dict[str, float]:
    """Contribution of each part to `value(all) - value(none)`: its marginal gain averaged over all orders.

    Args:
        value: of a coalition, for instance the accuracy of a method in which only these parts are switched on.
    """
    n, values = len(players), {}
    for size in range(n + 1):
        values |= {frozenset(c): value(frozenset(c)) for c in combinations(players, size)}
    weights = [math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n) for size in range(n)]
    return {
        player: sum(weights[len(c)] * (values[c | {player}] - values[c]) for c in values if player not in c)
        for player in players
    }
