"""Advice from labelled images alone: which triple, how good it will be, what more labels would bring, which to look at.

Every labelled image, support or validation, is held out once: in each fold a triple is fitted and its hyper-parameters
are chosen on the rest, so that the held-out answers come from methods that have not seen the image. Test images have no
part in it. tests/test_advice.py measures how often the advice is right.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from scipy import optimize, stats
from torch import Tensor
from torch.nn.functional import one_hot

from lib import methods, metrics, statistics
from lib.splits import Split, places
from lib.tasks import FewShotTask

Number = float | int
Z = float(stats.norm.ppf(0.975))
# Variance of a cross-validated accuracy around that of the saved method, over its variance over images: what is judged
# is also what is learned from. 240 draws gave 1.27, other 240 test it (tests/test_advice.py); Nadeau and Bengio's
# correction (2003) would be 2 and more, and promise too little.
DRAW = 1.3


def labelled(task: FewShotTask) -> Split:
    """Support and validation images as one split, support first."""
    if not task.val:
        return task.support
    pairs = ((getattr(part, name) for part in (task.support, task.val)) for name in ("clip", "aux", "y", "zero_shot"))
    return Split(*(torch.cat([*pair]) for pair in pairs))


def folds(task: FewShotTask, count: int) -> Int64[Tensor, " n"]:
    """Fold of each labelled image; as many folds as a class has images, at most `count`, and of each class alike.

    Were the held-out image its class's only loss, caches and priors would lean to the other classes in every fold. An
    image that is alone in its class has -1: without it there would be nothing to learn the class from.
    """
    y, size = labelled(task).y, len(task.support)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(task.seed))
    order = torch.cat([order[order < size], order[order >= size]])
    place = torch.empty_like(y)
    place[order] = places(y[order])
    return torch.where(torch.bincount(y)[y] > 1, place % min(max(2, count), int(place.max()) + 1), -1)


def without(task: FewShotTask, held: Bool[Tensor, " n"], shots: int | None = None) -> FewShotTask:
    """The task without the labelled images `held`, which become its test part; the others keep their role.

    A class that would lose all its support gets one of its validation images. `shots` keeps so many of each class.
    """
    every, size = labelled(task), len(task.support)
    kept = ~held
    support, left = kept[:size].nonzero()[:, 0], size + kept[size:].nonzero()[:, 0]
    bare = torch.bincount(every.y[support], minlength=task.num_classes) == 0
    moved = bare[every.y[left]] & (places(every.y[left]) == 0)
    support, left = torch.cat([support, left[moved]]), left[~moved]
    support = support if shots is None else support[places(every.y[support]) < shots]
    parts = {"support": every.rows(support), "val": every.rows(left) if len(left) else None}
    parts |= {"test": every.rows(held.nonzero()[:, 0]), "shots": int(torch.bincount(every.y[support]).max())}
    return replace(task, **parts, views=(), rows=None)


def build(candidate: str, protocol: str = "val") -> methods.Method:
    """A method by name, see `methods.build`; `gda@aux` is GDA on the features `aux`."""
    name, at, features = candidate.partition("@")
    return methods.build(name, protocol, **({"features": features} if at else {}))


def fit(candidate: str, task: FewShotTask, protocol: str = "val") -> methods.Method:
    """A fitted candidate; without validation images its hyper-parameters are the published constants."""
    return build(candidate, protocol if task.val else "fixed").fit(task)


@dataclass(frozen=True)
class CrossValidated:
    """Answers to the labelled images by triples that have not seen them."""

    y: Int64[Tensor, " n"]
    fold: Int64[Tensor, " n"]  # -1: never held out
    logits: Mapping[str, Float[Tensor, "n C"]]  # by candidate; NaN where never held out
    seconds: Mapping[str, float]  # of a fit, mean over the folds
    shots: float  # support images per class inside a fold, mean

    @property
    def hits(self) -> pd.DataFrame:
        """Whether each held-out image is classified correctly, a column per candidate; rows are labelled images."""
        rows = (self.fold >= 0).nonzero()[:, 0]
        correct = {name: metrics.correct(s[rows], self.y[rows]).numpy() for name, s in self.logits.items()}
        return pd.DataFrame(correct, index=rows.numpy()).astype(float)


def nested_cv(
    task: FewShotTask, candidates: Sequence[str], count: int = 10, protocol: str = "val", shots: int | None = None
) -> CrossValidated:
    """Every candidate in at most `count` folds of a task's labelled images, hyper-parameters chosen inside each fold.

    `shots` leaves at most so many support images of a class in each fold, for a learning curve.
    """
    y, fold = labelled(task).y, folds(task, count)
    if not (fold >= 0).any():
        raise ValueError(f"{task.name}: no class has two labelled images, so none can be held out; label more")
    kinds = fold[fold >= 0].unique().tolist()
    inner = {k: without(task, fold == k, shots) for k in kinds}
    logits, seconds = {}, {}
    for name in candidates:
        logits[name], begin = torch.full((len(y), task.num_classes), math.nan), time.perf_counter()
        fitted = {k: fit(name, inner[k], protocol) for k in kinds}
        seconds[name] = (time.perf_counter() - begin) / len(kinds)
        for k in kinds:
            logits[name][fold == k] = fitted[k].logits(inner[k].test)
    size = sum(len(part.support) for part in inner.values()) / len(kinds) / task.num_classes
    return CrossValidated(y, fold, logits, seconds, size)


def recommend(hits: pd.DataFrame) -> str:
    """Candidate with the most hits; of equal ones the first."""
    return str(hits.mean().idxmax())


def lead(hits: pd.DataFrame) -> pd.DataFrame:
    """Lead of the recommended candidate over each other one in points, paired over images: `difference`, `half`, `p`.

    The variance over images is widened by DRAW. `p_holm` counts the others, `verdict` is `ahead` or `tie`.
    """
    first = recommend(hits)
    gaps = 100 * hits.drop(columns=first).rsub(hits[first], axis=0)
    table = pd.DataFrame({"difference": gaps.mean(), "half": Z * np.sqrt(DRAW * gaps.var() / len(gaps))})
    score = table["difference"] / np.sqrt(DRAW * (gaps**2).mean() / len(gaps))  # McNemar's, widened; 0 / 0 if all agree
    table["p"] = 2 * stats.norm.sf(score.fillna(0.0))
    table["p_holm"] = statistics.holm(table["p"])
    return table.assign(verdict=np.where(table["p_holm"] < 0.05, "ahead", "tie"))


def optimism(hits: pd.DataFrame, y: Sequence[int], draws: int = 300, seed: int = 0) -> float:
    """What the hits of the best candidate owe to its being chosen by them, in [0, 1], by the bootstrap over images.

    mean over draws of (accuracy of a draw's best on the draw - on all images), each class resampled by itself
    (Tibshirani and Tibshirani, 2009; Tsamardinos et al., 2018).
    """
    rng, table, groups = np.random.default_rng(seed), hits.to_numpy(), pd.Series(range(len(hits))).groupby(np.array(y))
    weight = np.zeros((draws, len(table)))
    for rows in groups.indices.values():
        weight[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws)
    drawn = weight @ table / len(table)
    best = drawn.argmax(axis=1)
    return max(0.0, float((drawn.max(axis=1) - table.mean(axis=0)[best]).mean()))


def expected_accuracy(
    hits: pd.DataFrame, y: Sequence[int], name: str, sizes: Mapping[Number, pd.Series], shots: Number
) -> dict[str, float]:
    """Accuracy to expect of candidate `name`, fitted on `shots` images per class, and its 95 % interval, in [0, 1].

    error = e (e / e')^(log(shots / k) / log(k / k')) + optimism,    e, e' cross-validated at k > k' shots

    A fold has fewer images than the fit to come, hence the power law through two of the `sizes` (shots in a fold to
    hits of `name`; k' is the largest up to a third of k); the best of many looks better than it is, hence `optimism`.
    The interval, `low` to `high` around `mean`, is Wilson's at the number of images that would give the variance over
    images, widened by DRAW. It holds for new images whose classes are as frequent as among the labelled ones, `y`.
    """
    value, lucky, k = hits[name].to_numpy(), optimism(hits, y), max(sizes)
    smaller = sorted(size for size in sizes if size < k)
    fewer = max((size for size in smaller if 3 * size <= k), default=smaller[0] if smaller else k)
    rate, few = 1 - value.mean(), 1 - sizes[fewer].mean()
    left = rate
    if fewer < k < shots and 0 < rate < few:
        power = math.log(shots / k) / math.log(k / fewer)
        left = rate * (rate / few) ** power
        parts = (1 + power) * (1 - value) / rate - power * (1 - sizes[fewer].to_numpy()) / few
        value = 1 - left * parts  # each image's part in the error, to first order
    mean, n = float(np.clip(1 - left - lucky, 0, 1)), len(value)
    spread = max(value.var() / max(mean * (1 - mean), 1e-12), 1.0) if mean < 1 else 1.0
    low, high = wilson(mean, n / spread / DRAW)
    high = high if rate > 0 else 1.0  # without an error nothing speaks against 100 %
    return {"mean": mean, "low": low, "high": high, "images": n, "optimism": lucky, "gain": float(rate - left)}


def wilson(mean: float, n: Number, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a fraction of n, which need not be whole."""
    centre, half = mean + z * z / 2 / n, z * math.sqrt(mean * (1 - mean) / n + z * z / 4 / n / n)
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def power_law(shots: Sequence[Number], errors: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Least-squares a, b, c of error = a + b shots^-c, all at least 0 and c at most 2; NaN with fewer than 3 points."""
    if len(shots) < 3:
        return math.nan, math.nan, math.nan
    start, bounds = (0.0, max(errors[0], 1e-3), 0.5), ([0, 0, 0], [1, 2, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optimize.OptimizeWarning)  # of its covariance, which is not used
        fitted, _ = optimize.curve_fit(_law, np.array(shots), np.array(errors), start, bounds=bounds, max_nfev=2000)
    return tuple(map(float, fitted))


def forecast(hits: Mapping[Number, pd.Series], at: Sequence[Number], draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """Accuracy at other numbers of shots by a `power_law` through cross-validated ones, in [0, 1], and 95 % intervals.

    A row for each of `at`: `mean`, `low`, `high`, and the same of the gain over the first of them, `gain_mean`, ….
    `hits` has the same images at each number of shots. The variance is that of laws refitted to images drawn anew, and
    what the draw adds (DRAW - 1) to a fit now and to one then. It does not know whether the law holds out there.
    """
    table, rng = np.stack([part.to_numpy() for part in hits.values()], axis=1), np.random.default_rng(seed)
    samples = [slice(None), *(rng.integers(len(table), size=len(table)) for _ in range(draws))]
    laws = [power_law(list(hits), 1 - table[rows].mean(axis=0)) for rows in samples]
    values = np.array([1 - _law(np.array(at), *law) for law in laws])
    drawn = 2 * (DRAW - 1) * values[0] * (1 - values[0]) / len(table)
    columns = {}
    for prefix, part, least in (("", values, 0.0), ("gain_", values - values[:, :1], -1.0)):
        half = Z * np.sqrt(part[1:].var(axis=0) + drawn)
        columns |= {f"{prefix}mean": part[0], f"{prefix}low": (part[0] - half).clip(least, 1)}
        columns |= {f"{prefix}high": (part[0] + half).clip(least, 1)}
    return pd.DataFrame(columns, index=list(at))


def margins(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Log-probability of each label less that of the best other class: far below 0 where a label is a suspect."""
    scores = logits.log_softmax(1)
    label = one_hot(y, logits.shape[1]).bool()
    return scores[label] - scores.masked_fill(label, -math.inf).amax(1)


def confused(logits: Float[Tensor, "n C"], y: Int64[Tensor, " n"]) -> pd.Series:
    """How many images of one of two classes were taken for the other, most first; indexed by both class indices."""
    pairs = torch.stack([y, metrics.predictions(logits)]).sort(dim=0).values.T
    counts = pd.Series([tuple(pair) for pair in pairs[pairs[:, 0] < pairs[:, 1]].tolist()], dtype=object)
    return counts.value_counts()


def _law(shots: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    return a + b * shots**-c
