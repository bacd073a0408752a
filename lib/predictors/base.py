"""Logit predictors: features in, bias logits out.

A predictor is built from hyper-parameters, learns from a task with `fit(task) -> self` and turns any split into
bias logits with `logits(split) -> [n, C]`. A second `fit` forgets the first; what was learned ends in `_`.
Labels are read from `task.support` alone, and from `task.val` where a docstring says that something is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lib import fusion, metrics
from lib.predictors import training
from lib.tasks import FewShotTask, Split


class Predictor:
    """What every predictor shares: its features, and the loops that cleverer predictors replace by one pass."""

    features: str

    def fit(self, task: FewShotTask) -> Predictor:
        """Learn from the support; forget whatever was learned before."""
        raise NotImplementedError

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        """Return the bias logits of each row."""
        raise NotImplementedError

    def _orders(self, task: FewShotTask, epochs: int) -> Int64[Tensor, "epochs n"]:
        """Return the order in which training sees the support; the one place where its seed acts."""
        return training.epoch_orders(len(task.support), epochs, torch.Generator().manual_seed(task.seed))

    def _refuse_other_features(self) -> None:
        if self.features != "clip":
            raise ValueError(
                f"{type(self).__name__} compares images with class texts, which only clip features allow; "
                f"features are {self.features!r}"
            )

    @classmethod
    def fit_many(cls, task: FewShotTask, settings: Sequence[Mapping[str, object]]) -> list[Predictor]:
        """Fit one predictor for each set of hyper-parameters."""
        return [cls(**setting).fit(task) for setting in settings]

    def logits_grid(self, split: Split, settings: Sequence[Mapping[str, object]]) -> Iterator[Float[Tensor, "n C"]]:
        """Yield the logits under each set of hyper-parameters that act after the fit."""
        kept = dict(vars(self))
        for setting in settings:
            vars(self).update(setting)
            logits = self.logits(split)
            vars(self).update(kept)
            yield logits


class JointPredictor(Predictor):
    """A predictor that is fitted many at a time: settings that differ in `varying` alone share one pass."""

    varying: frozenset[str]

    def fit(self, task: FewShotTask) -> Predictor:
        self._fit_together(task, [self])
        return self

    @classmethod
    def fit_many(cls, task: FewShotTask, settings: Sequence[Mapping[str, object]]) -> list[Predictor]:
        """Fit one predictor for each set of hyper-parameters, in as few passes as there are different shared ones."""
        fitted = [cls(**setting) for setting in settings]
        groups: dict[tuple, list[Predictor]] = {}
        for predictor in fitted:
            shared = tuple(value for name, value in vars(predictor).items() if name not in cls.varying)
            groups.setdefault(shared, []).append(predictor)
        for group in groups.values():
            cls._fit_together(task, group)
        return fitted

    @classmethod
    def _fit_together(cls, task: FewShotTask, group: Sequence[Predictor]) -> None:
        raise NotImplementedError


class NoPredictor(Predictor):
    """No bias at all: zero-shot CLIP."""

    def __init__(self, features: str = "clip") -> None:
        self.features = features

    def fit(self, task: FewShotTask) -> NoPredictor:
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return torch.zeros_like(split.zero_shot)


def initial_weight(task: FewShotTask, features: str, init: str) -> Float[Tensor, "C D"]:
    """Return where a linear head starts: `mean`, `zero`, `random` (uniform within 1/sqrt(D), seeded) or `text`."""
    x = task.support.features(features)
    if init == "mean":
        return metrics.class_means(x, task.support.y, task.num_classes)
    if init == "zero":
        return torch.zeros(task.num_classes, x.shape[1])
    if init == "random":
        return random_weight(task, (task.num_classes, x.shape[1]))
    if init == "text":
        if features != "clip":
            raise ValueError(
                f"only clip features share a space with the texts; init 'text' cannot start on {features!r}"
            )
        return task.text.clone()
    raise ValueError(f"init is one of mean, zero, random, text, not {init!r}")


def random_weight(task: FewShotTask, shape: Sequence[int]) -> Float[Tensor, "m D"]:
    """Return PyTorch's initial weight of a linear layer, uniform within 1/sqrt(D), drawn with the task's seed."""
    generator = torch.Generator().manual_seed(task.seed)
    return (2 * torch.rand(*shape, generator=generator) - 1) / shape[1] ** 0.5
