"""The contract of logit predictors: features in, bias logits out.

A predictor is a dataclass whose fields are its hyper-parameters; nothing writes to them after construction. `fit` reads
`task.support` (and `task.val` where it says so), forgets earlier fits, and writes attributes that end in `_`.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lib import metrics
from lib.predictors import training
from lib.splits import Split
from lib.tasks import FewShotTask


@dataclass(eq=False)
class Predictor:
    """What all predictors share: a check of the task, and default loops, overridden where one pass is faster."""

    features: str = "aux"
    clip_only: ClassVar[bool] = False  # compares images with class texts, so that features must be `clip`
    needs_text: ClassVar[bool] = False  # uses task.text or zero_shot
    needs_prompts: ClassVar[bool] = False  # uses task.prompts
    equal_shots: ClassVar[bool] = False  # the formula needs as many support images in one class as in another
    per_batch: ClassVar[bool] = False  # a row's logits depend on the other rows of the split

    def fit(self, task: FewShotTask) -> Predictor:
        raise NotImplementedError

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        raise NotImplementedError

    def uses_text(self) -> bool:
        """`needs_text`, or what it becomes with this object's fields."""
        return self.needs_text

    def check(self, task: FewShotTask) -> None:
        """Raise a ValueError that names what this predictor cannot take; each `fit` begins with it."""
        name, counts = type(self).__name__, task.counts
        if self.clip_only and self.features != "clip":
            only = f"{name} compares images with class texts, which only clip features allow"
            raise ValueError(f"{only}; features are {self.features!r}")
        if task.text is None and self.uses_text():
            raise ValueError(f"{name} needs class texts, but {task.name} has no text features")
        if self.needs_prompts and task.prompts is None:
            raise ValueError(f"{name} needs prompts kept apart, the same number in each class; {task.name} has none")
        if self.equal_shots and counts.min() < counts.max():
            few, many = (f"{task.classnames[int(i)]!r} has {counts[i]}" for i in (counts.argmin(), counts.argmax()))
            raise ValueError(f"{name} needs the same number of support images in each class, but {few} and {many}")

    @classmethod
    def fit_many(cls, task: FewShotTask, settings: Sequence[Mapping[str, object]]) -> list[Predictor]:
        """One fitted predictor for each set of hyper-parameters."""
        return [cls(**setting).fit(task) for setting in settings]

    def with_params(self, **params: object) -> Predictor:
        """Copy with other values of hyper-parameters that act after the fit; fitted attributes are shared."""
        other = copy.copy(self)
        vars(other).update(params)
        return other

    def logits_grid(self, split: Split, settings: Sequence[Mapping[str, object]]) -> Iterator[Float[Tensor, "n C"]]:
        """Logits under each set of hyper-parameters that act after the fit, one after another."""
        return (self.with_params(**setting).logits(split) for setting in settings)


def hyper_parameters(cls: type[Predictor]) -> dict[str, object]:
    """Each hyper-parameter with its default."""
    return {field.name: field.default for field in fields(cls)}


def group_settings(predictors: Sequence[Predictor], varying: Container[str]) -> list[list[Predictor]]:
    """Groups of predictors that differ in `varying` alone, for a `fit_many` that fits each group in one pass."""
    groups = {}
    for predictor in predictors:
        shared = [name for name in hyper_parameters(type(predictor)) if name not in varying]
        groups.setdefault(tuple(getattr(predictor, name) for name in shared), []).append(predictor)
    return list(groups.values())


@dataclass(eq=False)
class GroupPredictor(Predictor):
    """Predictors of which those that differ in `varying` alone are fitted in one pass, by `fit_group`."""

    varying: ClassVar[Container[str]] = ()

    def fit(self, task: FewShotTask, **start: Tensor | None) -> GroupPredictor:
        self.check(task)
        self.fit_group(task, [self], **start)
        return self

    @classmethod
    def fit_many(cls, task: FewShotTask, settings: Sequence[Mapping[str, object]]) -> list[GroupPredictor]:
        predictors = [cls(**setting) for setting in settings]
        for predictor in predictors:
            predictor.check(task)
        for group in group_settings(predictors, cls.varying):
            cls.fit_group(task, group)
        return predictors

    @classmethod
    def fit_group(cls, task: FewShotTask, group: Sequence[GroupPredictor]) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class NoPredictor(Predictor):
    """No bias at all: zero-shot CLIP."""

    features: str = "clip"

    def fit(self, task: FewShotTask) -> NoPredictor:
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return torch.zeros_like(split.zero_shot)


def row_orders(task: FewShotTask, epochs: int) -> training.Orders:
    """Order in which training visits the support, drawn with the task's seed."""
    return training.epoch_orders(len(task.support), epochs, torch.Generator().manual_seed(task.seed))


def random_weight(task: FewShotTask, shape: tuple[int, int]) -> Float[Tensor, "m D"]:
    """PyTorch's initial weight of a linear layer, uniform within 1/sqrt(D), drawn with the task's seed."""
    generator = torch.Generator().manual_seed(task.seed)
    return (2 * torch.rand(*shape, generator=generator) - 1) / shape[1] ** 0.5


def initial_weight(task: FewShotTask, features: str, init: str) -> Float[Tensor, "C D"]:
    """Start of a linear head: `mean` (class means), `zero`, `random` (see `random_weight`) or `text`."""
    x, num_classes = task.support.features(features), task.num_classes
    if init == "text" and (features != "clip" or task.text is None):
        raise ValueError(f"init 'text' needs class texts and clip features, which share a space, not {features!r}")
    starts = {
        "mean": lambda: metrics.class_means(x, task.support.y, num_classes),
        "zero": lambda: x.new_zeros(num_classes, x.shape[1]),
        "random": lambda: random_weight(task, (num_classes, x.shape[1])),
        "text": lambda: task.text.clone(),
    }
    if init not in starts:
        raise ValueError(f"init is one of {', '.join(starts)}, not {init!r}")
    return starts[init]()
