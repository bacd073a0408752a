"""Statistics: whether a difference exceeds chance. Intervals, paired tests, ranks, Shapley contributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats


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


def paired(first: Sequence[float] | pd.Series, second: Sequence[float] | pd.Series) -> dict[str, float]:
    """Mean difference first - second over seeds (`difference`), half-width of its 95 % t interval (`half`) and `p` of
    the paired t-test, two-sided; a single seed gives neither interval nor p (NaN).
    """
    gap = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    mean, half = mean_interval(gap)
    if len(gap) < 2 or math.isnan(mean):
        p = math.nan
    else:  # a difference that all seeds share has no spread to be tested against
        p = float(stats.ttest_1samp(gap, 0.0).pvalue if np.ptp(gap) > 0 else mean == 0)
    return {"difference": mean, "half": half, "p": p}


def against(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Every column `paired` with one of them, corrected by Holm for their number.

    `scores` has a row per seed (of one data set and number of shots) and a column per method. A row per other column
    comes back: `difference`, `half`, `p`, `p_holm`, `verdict` at 5 % (better, worse, tie; a dash with one seed) and
    `edge`, whether p_holm lies between 0.02 and 0.08, where the verdict may turn.
    """
    table = pd.DataFrame({name: paired(scores[name], scores[reference]) for name in scores.columns.drop(reference)}).T
    table["p_holm"] = holm(table["p"])
    sign = np.where(table["difference"] > 0, "better", "worse")
    table["verdict"] = np.where(table["p"].isna(), "–", np.where(table["p_holm"] < 0.05, sign, "tie"))
    return table.assign(edge=table["p_holm"].between(0.02, 0.08))


def pm(mean: float, half: float, digits: int = 1, sign: bool = False) -> str:
    """A mean and its half-width as text, `62.4 ± 0.8`; a dash for what does not exist."""
    plus = "+" if sign else ""
    parts = [f"{mean:{plus}.{digits}f}", f"{half:.{digits}f}"]
    return " ± ".join(part if math.isfinite(x) else "–" for part, x in zip(parts, (mean, half), strict=True))


def holm(p: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    """P-values corrected by Holm's step-down rule for the number of comparisons; those that are NaN do not count."""
    raw = np.asarray(p, dtype=float)
    corrected, order = np.full_like(raw, np.nan), np.argsort(raw)[: np.isfinite(raw).sum()]  # NaN are sorted last
    stepped = np.maximum.accumulate(raw[order] * np.arange(len(order), 0, -1))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def shapley(value: Callable[[frozenset[str]], float], players: Sequence[str]) -> dict[str, float]:
    """Contribution of each part to `value(all) - value(none)`: its marginal gain averaged over all orders.

    `value` is a coalition's, for instance the accuracy of a method in which only these parts are switched on.
    """
    n, values = len(players), {}
    for size in range(n + 1):
        values |= {frozenset(c): value(frozenset(c)) for c in combinations(players, size)}
    weights = [math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n) for size in range(n)]
    return {
        player: sum(weights[len(c)] * (values[c | {player}] - values[c]) for c in values if player not in c)
        for player in players
    }
