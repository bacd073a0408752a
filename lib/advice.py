"""Advice from labelled images alone: which triple, how good it will be, what more labels would bring, which to look at.

Every labelled image, support or validation, is held out once: in each fold a triple is fitted and its hyper-parameters
are chosen on the rest, so that the held-out answers are those of a method that has not seen the image. Test images have
no part in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from scipy import optimize, stats
from torch import Tensor

from lib import methods, metrics, statistics
from lib.tasks import FewShotTask, Split

Z = float(stats.norm.ppf(0.975))


def labelled(task: FewShotTask) -> Split:
    """Support and validation images as one split, support first."""
    if not task.val:
        return task.support
    pairs = ((getattr(part, name) for part in (task.support, task.val)) for name in ("clip", "aux", "y", "zero_shot"))
    return Split(*(torch.cat([*pair]) for pair in pairs))


def folds(y: Int64[Tensor, " n"], count: int, seed: int) -> Int64[Tensor, " n"]:
    """Fold of each image, in [0, count): every class is dealt out in turn, so that none loses two of its two images.

    An image that is alone in its class has -1: without it there would be nothing to learn the class from.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(y[order], stable=True)]
    fold = torch.empty_like(y)
    fold[order] = torch.arange(len(y)) % max(2, min(count, len(y)))
    return torch.where(torch.bincount(y)[y] > 1, fold, -1)


def without(task: FewShotTask, held: Tensor, shots: int | None = None) -> FewShotTask:
    """The task without the labelled images `held` (a mask), which become its test part.

    Images keep their role; a class that would lose all its support gets one of its validation images. `shots` keeps
    that many support images of each class, the first ones.
    """
    every, size = labelled(task), len(task.support)
    support, left = (~held).nonzero()[:, 0].split([int((~held[:size]).sum()), int((~held[size:]).sum())])
    bare = set(range(task.num_classes)) - set(every.y[support].tolist())
    moved = {c: next(row for row in left.tolist() if every.y[row] == c) for c in bare}
    support = torch.cat([support, torch.tensor(sorted(moved.values()), dtype=torch.long)])
    left = torch.tensor([row for row in left.tolist() if row not in moved.values()], dtype=torch.long)
    if shots is not None:
        place = torch.nn.functional.one_hot(every.y[support], task.num_classes).cumsum(0)
        support = support[place.gather(1, every.y[support][:, None])[:, 0] <= shots]
    val = every.rows(left) if len(left) else None
    most = int(torch.bincount(every.y[support]).max())
    return replace(task, support=every.rows(support), val=val, test=every.rows(held.nonzero()[:, 0]), shots=most,
                   views=(), rows=None)


def triple(candidate: str) -> tuple[str, dict[str, object]]:
    """Method and fixed hyper-parameters of a candidate, `gda` or, with the features of its bias, `gda@aux`."""
    name, at, features = candidate.partition("@")
    return name, {"features": features} if at else {}


def fit(candidate: str, task: FewShotTask, protocol: str = "val") -> methods.Method:
    """A fitted candidate; without validation images its constants are the published ones."""
    name, given = triple(candidate)
    return methods.build(name, protocol if task.val else "fixed", **given).fit(task)


@dataclass(frozen=True)
class CrossValidated:
    """Answers to every labelled image by triples that have not seen it."""

    y: Int64[Tensor, " n"]
    fold: Int64[Tensor, " n"]  # -1: never held out
    logits: Mapping[str, Float[Tensor, "n C"]]  # by candidate; NaN where never held out
    seconds: Mapping[str, float]  # of a fit, mean over the folds

    @property
    def hits(self) -> pd.DataFrame:
        """Whether each held-out image is classified correctly, a column per candidate; indexed by row and fold."""
        rows = (self.fold >= 0).nonzero()[:, 0]
        correct = {name: metrics.correct(s[rows], self.y[rows]).numpy() for name, s in self.logits.items()}
        index = pd.MultiIndex.from_arrays([rows.numpy(), self.fold[rows].numpy()], names=["row", "fold"])
        return pd.DataFrame(correct, index=index)


def nested_cv(
    task: FewShotTask, candidates: Sequence[str], count: int = 10, protocol: str = "val", shots: int | None = None
) -> CrossValidated:
    """Every candidate fitted in `count` folds of the labelled images of a task, hyper-parameters chosen inside each."""
    every = labelled(task)
    fold = folds(every.y, count, task.seed)
    logits = {name: torch.full((len(every.y), task.num_classes), math.nan) for name in candidates}
    seconds = dict.fromkeys(candidates, 0.0)
    kinds = fold[fold >= 0].unique().tolist()
    for k in kinds:
        inner = without(task, fold == k, shots)
        for name in candidates:
            begin = time.perf_counter()
            fitted = fit(name, inner, protocol)
            seconds[name] += (time.perf_counter() - begin) / len(kinds)
            logits[name][fold == k] = fitted.logits(inner.test)
    return CrossValidated(every.y, fold, logits, seconds)


def recommend(hits: pd.DataFrame) -> str:
    """Candidate with the most hits; of equal ones the first."""
    return str(hits.mean().idxmax())


def honest_hits(hits: pd.DataFrame) -> pd.Series:
    """Hits of the advice itself: in each fold those of the candidate that leads in the others."""
    parts = []
    for k, part in hits.groupby(level="fold"):
        others = hits.drop(index=k, level="fold")
        parts.append(part[recommend(others if len(others) else hits)])
    return pd.concat(parts)
