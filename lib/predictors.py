"""Logit predictors: features in, bias logits out.

A predictor is built from hyper-parameters, learns from a task with `fit(task) -> self` and turns any split into
bias logits with `logits(split) -> [n, C]`. A second `fit` forgets the first; what was learned ends in `_`.
Labels are read from `task.support` alone, and from `task.val` where a docstring says that something is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib import fusion, training
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


class MultiBranchHead(JointPredictor):
    """AMU-Tuning's linear head `W g`, trained on an auxiliary and a fused branch.

        loss = (1 - lam) CE(a, y) + lam CE(s0 + beta u(s0) a, y),    a = W g or its z-score

    Args:
        features: `clip`, `aux` or `clip+aux`.
        init: where W starts: `mean` (class means), `zero`, `random` (PyTorch's linear layer), or `text`
            (class texts; for features `clip` only).
        lam: weight of the fused branch in [0, 1].
        beta, confidence, rho, on, constant: the fusion inside the second branch, see `fusion.uncertain`.
        standardised: z-score the bias logits of each image, in both branches and in what `logits` returns.
        lr, weight_decay, epochs, batch_size: of AdamW (eps 1e-4) with a cosine per step.
        select_epoch: keep the weights of the epoch with the best fused accuracy on `task.val` (the first of equals)
            instead of the last; without validation images the last epoch is kept.
        keep_epochs: leave the weights after each epoch in `epoch_weights_`, for training curves.

    If the task has augmented views, each visit of an image shows one of them at random.

    Source: AMU-Tuning, eq. 6-11, and repository TJU-sjyj/AMU-Tuning.
    """

    varying = frozenset(
        (
            *("init", "lam", "lr", "weight_decay", "select_epoch", "keep_epochs"),
            *("beta", "confidence", "rho", "on", "constant"),
        )
    )

    def __init__(
        self,
        features: str = "aux",
        init: str = "mean",
        lam: float = 0.5,
        beta: float = 1.0,
        confidence: str = "kurtosis",
        rho: float = 0.4,
        on: str = "logits",
        constant: float = 1.0,
        standardised: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        epochs: int = 50,
        batch_size: int = 8,
        select_epoch: bool = False,
        keep_epochs: bool = False,
    ) -> None:
        vars(self).update({name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return self.branches(split, self.weight_)[0]

    def branches(self, split: Split, weight: Float[Tensor, "C D"]) -> tuple[Float[Tensor, "n C"], Float[Tensor, "n C"]]:
        """Return the logits of the auxiliary and of the fused branch under any weights, an epoch's for instance."""
        bias = split.features(self.features) @ weight.T
        bias = fusion.standardise(bias) if self.standardised else bias
        return bias, split.zero_shot + self.beta * self._factor(split)[:, None] * bias

    def accuracy(self, split: Split, weight: Float[Tensor, "C D"]) -> float:
        """Return the share of images, in [0, 1], that the fused branch gets right under the given weights."""
        return fusion.accuracy(self.branches(split, weight)[1], split.y)

    @classmethod
    def _fit_together(cls, task: FewShotTask, heads: Sequence[MultiBranchHead]) -> None:
        first, views = heads[0], task.views or (task.support,)
        generator = torch.Generator().manual_seed(task.seed)
        orders = training.epoch_orders(len(task.support), first.epochs, generator)
        picks = torch.randint(len(views), orders.shape, generator=generator)
        for head in heads:
            head.weight_ = initial_weight(task, head.features, head.init)
            head.epoch_weights_ = []
        best = {}

        def keep(group: slice, weight: Float[Tensor, "b C D"]) -> None:
            for head, now in zip(heads[group], weight, strict=True):
                if head.keep_epochs:
                    head.epoch_weights_.append(now.clone())
                if head.select_epoch and task.val is not None:
                    accuracy = head.accuracy(task.val, now)
                    if accuracy > best.get(head, (-1.0, None))[0]:
                        best[head] = (accuracy, now.clone())

        steps_per_epoch = math.ceil(len(task.support) / first.batch_size)
        following = any(head.keep_epochs or head.select_epoch for head in heads)
        trained = training.train_heads(
            torch.stack([view.features(first.features) for view in views]),
            torch.stack([view.zero_shot for view in views]),
            task.support.y,
            torch.stack([head.weight_ for head in heads]),
            orders.expand(len(heads), -1, -1),
            lr=[head.lr for head in heads],
            weight_decay=[head.weight_decay for head in heads],
            lam=[head.lam for head in heads],
            beta=[head.beta for head in heads],
            factor=torch.stack([torch.stack([head._factor(view) for view in views]) for head in heads]),
            standardised=first.standardised,
            batch_size=first.batch_size,
            picks=picks.expand(len(heads), -1, -1) if len(views) > 1 else None,
            watched=range(steps_per_epoch, steps_per_epoch * first.epochs + 1, steps_per_epoch) if following else (),
            watch=keep,
        )
        for i, head in enumerate(heads):
            head.losses_, head.weight_ = trained.losses[i], best.get(head, (1.0, trained.weight[i]))[1]

    def _factor(self, split: Split) -> Float[Tensor, " n"]:
        return fusion.uncertainty(split.zero_shot, self.confidence, self.rho, self.on, self.constant)


class MLP(Predictor):
    """A perceptron with one hidden layer, trained like AMU-Tuning's head on two branches.

        a = W2 relu(W1 g + b1) + b2,    loss = (1 - lam) CE(a, y) + lam CE(s0 + beta a, y)

    Args:
        features: `clip`, `aux` or `clip+aux`.
        hidden: width of the hidden layer as a share of the feature dimension.
        lam, beta: of the loss.
        lr, weight_decay, epochs, batch_size: of AdamW (eps 1e-4) with a cosine per step.

    Source: the comparison of predictors in AMU-Tuning (table 6), which gives no width; a quarter is CLIP-Adapter's.
    """

    def __init__(
        self,
        features: str = "aux",
        hidden: float = 0.25,
        lam: float = 0.5,
        beta: float = 1.0,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        epochs: int = 50,
        batch_size: int = 32,
    ) -> None:
        self.features, self.hidden, self.lam, self.beta = features, hidden, lam, beta
        self.lr, self.weight_decay, self.epochs, self.batch_size = lr, weight_decay, epochs, batch_size

    def fit(self, task: FewShotTask) -> MLP:
        x, zero_shot, y = task.support.features(self.features), task.support.zero_shot, task.support.y
        width = max(1, round(self.hidden * x.shape[1]))
        shapes = ((width, x.shape[1]), (1, width), (task.num_classes, width), (1, task.num_classes))
        generator = torch.Generator().manual_seed(task.seed)
        fans = (x.shape[1], x.shape[1], width, width)
        weights = [
            ((2 * torch.rand(shape, generator=generator) - 1) / fan**0.5).requires_grad_()
            for shape, fan in zip(shapes, fans, strict=True)
        ]

        def loss(rows: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
            bias = self._forward(x[rows], weights)
            fused = cross_entropy(zero_shot[rows] + self.beta * bias, y[rows])
            return (1 - self.lam) * cross_entropy(bias, y[rows]) + self.lam * fused

        optimiser = torch.optim.AdamW(weights, lr=self.lr, weight_decay=self.weight_decay, eps=1e-4)
        rates = training.cosine(self.lr, self.epochs * math.ceil(len(y) / self.batch_size))
        self.losses_ = training.minimise(loss, optimiser, self._orders(task, self.epochs), self.batch_size, rates)
        self.weights_ = [weight.detach() for weight in weights]
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return self._forward(split.features(self.features), self.weights_)

    @staticmethod
    def _forward(x: Float[Tensor, "n D"], weights: Sequence[Tensor]) -> Float[Tensor, "n C"]:
        first, first_bias, second, second_bias = weights
        return torch.relu(x @ first.T + first_bias) @ second.T + second_bias


def initial_weight(task: FewShotTask, features: str, init: str) -> Float[Tensor, "C D"]:
    """Return where a linear head starts: `mean`, `zero`, `random` (uniform within 1/sqrt(D), seeded) or `text`."""
    x = task.support.features(features)
    if init == "mean":
        return training.class_means(x, task.support.y, task.num_classes)
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
