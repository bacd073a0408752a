"""Heads on features: AMU-Tuning's linear head, trained or solved, a perceptron, logistic regression, GDA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib import fusion, metrics
from lib.predictors import convex, training
from lib.predictors.base import Predictor, group_settings, initial_weight, row_orders
from lib.tasks import FewShotTask, Split

PER_HEAD = ("init", "lam", "beta", "confidence", "rho", "on", "constant", "select_epoch", "keep_epochs")
Orders = Int64[Tensor, "epochs n"] | None


@dataclass(eq=False)
class TwoBranchHead(Predictor):
    """Linear heads on AMU-Tuning's loss, (1 - lam) CE(a, y) + lam CE(s0 + beta u(s0) a, y).

    Args:
        features: `clip`, `aux` or `clip+aux`.
        lam: weight of the fused branch in [0, 1]; 0 needs no class texts.
        beta, confidence, rho, on, constant: of the loss, whatever the fusion of a method is; see `fusion.uncertain`.
    """

    standardised: ClassVar[bool] = False  # a z-score is not convex; a trained head may have it
    lam: float = 0.5
    beta: float = 1.0
    confidence: str = "kurtosis"
    rho: float = 0.4
    on: str = "logits"
    constant: float = 1.0

    def uses_text(self) -> bool:
        return self.lam > 0

    def u(self, split: Split) -> Float[Tensor, " n"]:
        """`u(s0)` of each image in the loss."""
        return fusion.uncertainty(split.zero_shot, self.confidence, self.rho, self.on, self.constant)

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return self.branches(split, self.weight_)[0]

    def branches(self, split: Split, weight: Float[Tensor, "C D"]) -> tuple[Float[Tensor, "n C"], Float[Tensor, "n C"]]:
        """Logits of the auxiliary and of the fused branch of the loss under any weights, an epoch's for instance."""
        bias = split.features(self.features) @ weight.T
        bias = fusion.standardise(bias) if self.standardised else bias
        return bias, split.zero_shot + self.beta * self.u(split)[:, None] * bias


@dataclass(eq=False)
class MultiBranchHead(TwoBranchHead):
    """AMU-Tuning's linear head, trained: a = W g or its z-score.

    Args:
        init: start of W: `mean` (class means), `zero`, `random` (PyTorch's linear layer), or `text` (class texts; for
            features `clip` only).
        standardised: z-score the bias logits of each image, in both branches and in what `logits` returns.
        lr, weight_decay, epochs, batch_size: of AdamW (eps 1e-4) with a cosine per step.
        select_epoch: keep the weights of the epoch with the best fused accuracy on `task.val` (the first of equals)
            instead of the last; without validation images the last epoch is kept.
        keep_epochs: leave the weights after each epoch in `epoch_weights_`, for training curves.

    If the task has augmented views, each visit of an image takes one of them at random.

    Source: AMU-Tuning, eq. 6-11, and repository TJU-sjyj/AMU-Tuning.
    """

    init: str = "mean"
    standardised: bool = False
    lr: float = 1e-3
    weight_decay: float = 0.01
    epochs: int = 50
    batch_size: int = 8
    select_epoch: bool = False
    keep_epochs: bool = False

    def fit(self, task: FewShotTask, orders: Orders = None) -> MultiBranchHead:
        """Train; `orders` takes the place of the seeded order of the rows."""
        self._fit_group(task, [self], orders)
        return self

    @classmethod
    def fit_many(cls, task: FewShotTask, settings: Sequence[Mapping[str, object]]) -> list[MultiBranchHead]:
        heads = [cls(**setting) for setting in settings]
        for group in group_settings(heads, PER_HEAD):
            cls._fit_group(task, group)
        return heads

    @classmethod
    def _fit_group(cls, task: FewShotTask, heads: Sequence[MultiBranchHead], orders: Orders = None) -> None:
        for head in heads:
            head.check(task)
            head.epoch_weights_ = []
        first, views, best = heads[0], task.views or (task.support,), {}
        generator = torch.Generator().manual_seed(task.seed)
        seeded = training.epoch_orders(len(task.support), first.epochs, generator)
        orders = seeded if orders is None else orders
        picks = torch.randint(len(views), orders.shape, generator=generator)

        def keep(group: slice, weights: Float[Tensor, "b C D"]) -> None:
            for head, weight in zip(heads[group], weights, strict=True):
                if head.keep_epochs:
                    head.epoch_weights_.append(weight.clone())
                if head.select_epoch and task.val is not None:
                    accuracy = metrics.accuracy(head.branches(task.val, weight)[1], task.val.y)
                    if accuracy > best.get(head, (-1.0, None))[0]:
                        best[head] = (accuracy, weight.clone())

        per_epoch = math.ceil(len(task.support) / first.batch_size)
        follow = any(head.keep_epochs or head.select_epoch for head in heads)
        trained = training.train_heads(
            torch.stack([view.features(first.features) for view in views]),
            torch.stack([view.zero_shot for view in views]),
            task.support.y,
            torch.stack([initial_weight(task, head.features, head.init) for head in heads]),
            orders,
            lr=first.lr,
            weight_decay=first.weight_decay,
            lam=[head.lam for head in heads],
            beta=[head.beta for head in heads],
            u=torch.stack([torch.stack([head.u(view) for view in views]) for head in heads]),
            standardised=first.standardised,
            batch_size=first.batch_size,
            picks=picks if len(views) > 1 else None,
            watched=range(per_epoch, per_epoch * first.epochs + 1, per_epoch) if follow else (),
            watch=keep,
        )
        for head, weight, losses in zip(heads, trained.weight, trained.losses, strict=True):
            head.losses_, head.weight_ = losses, best.get(head, (1.0, weight))[1]


@dataclass(eq=False)
class ConvexHead(TwoBranchHead):
    """AMU-Tuning's linear head at the optimum of its two-branch loss, which is convex without the z-score.

        mean_i [(1 - lam) CE(W g_i, y_i) + lam CE(s0_i + beta u(s0_i) W g_i, y_i)] + penalty / 2 ||W||^2

    The penalty does what 50 epochs from the class means do in the paper: it keeps W small. No order, no rate, no seed.

    """

    penalty: float = 1e-3  # above 0
    tolerance: float = 1e-3  # `gradient_norm_` to stop at, relative to the one at W = 0

    def fit(self, task: FewShotTask) -> ConvexHead:
        self._fit_path(task, [self])
        return self

    @classmethod
    def fit_many(cls, task: FewShotTask, settings: Sequence[Mapping[str, object]]) -> list[ConvexHead]:
        heads = [cls(**setting) for setting in settings]
        for path in group_settings(heads, ("penalty",)):
            cls._fit_path(task, path)
        return heads

    @classmethod
    def _fit_path(cls, task: FewShotTask, heads: Sequence[ConvexHead]) -> None:
        (first, *_), support = heads, task.support
        first.check(task)
        x, u, penalties = support.features(first.features), first.beta * first.u(support), [h.penalty for h in heads]
        settings = {"lam": first.lam, "u": u, "tolerance": first.tolerance}
        solved = convex.solve_path(x, support.zero_shot, support.y, penalties, **settings)
        for i, head in enumerate(heads):
            head.weight_, head.gradient_norm_ = solved.weight[i], solved.gradient_norms[i].item()
            head.evaluations_ = solved.evaluations[i].item()


@dataclass(eq=False)
class LinearProbe(Predictor):
    """Multinomial logistic regression on the features, without class texts.

        loss = sum_i CE(W x_i + b, y_i) + ||W||^2 / (2 inverse_penalty)

    Source: the linear probe of CLIP (Radford et al., 2021); agrees with scikit-learn's, see the tests.
    """

    features: str = "clip"
    inverse_penalty: float = 10.0  # scikit-learn's `C`, above 0

    def fit(self, task: FewShotTask) -> LinearProbe:
        self._fit_path(task, [self])
        return self

    @classmethod
    def fit_many(cls, task: FewShotTask, settings: Sequence[Mapping[str, object]]) -> list[LinearProbe]:
        probes = [cls(**setting) for setting in settings]
        for path in group_settings(probes, ("inverse_penalty",)):
            cls._fit_path(task, path)
        return probes

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return split.features(self.features) @ self.weight_.T + self.intercept_

    @classmethod
    def _fit_path(cls, task: FewShotTask, probes: Sequence[LinearProbe]) -> None:
        x, support = task.support.features(probes[0].features).double(), task.support
        penalties = [1 / (probe.inverse_penalty * len(x)) for probe in probes]
        solved = convex.solve_path(x, support.zero_shot, support.y, penalties, intercept=True, tolerance=1e-6)
        for i, probe in enumerate(probes):
            probe.weight_, probe.intercept_ = solved.weight[i].float(), solved.intercept[i].float()
            probe.gradient_norm_ = solved.gradient_norms[i].item()


@dataclass(eq=False)
class MLP(Predictor):
    """A perceptron with one hidden layer, trained like AMU-Tuning's head on two branches.

        a = W2 relu(W1 g + b1) + b2,    loss = (1 - lam) CE(a, y) + lam CE(s0 + beta a, y)

    Source: the comparison of predictors in AMU-Tuning (table 6), which gives no width; a quarter is CLIP-Adapter's.
    """

    hidden: float = 0.25  # width of the hidden layer as a fraction of the feature dimension
    lam: float = 0.5  # 0 needs no class texts
    beta: float = 1.0
    lr: float = 1e-3  # of AdamW (eps 1e-4) with a cosine per step, as what follows
    weight_decay: float = 0.01
    epochs: int = 50
    batch_size: int = 32

    def uses_text(self) -> bool:
        return self.lam > 0

    def fit(self, task: FewShotTask) -> MLP:
        self.check(task)
        x, zero_shot, y = task.support.features(self.features), task.support.zero_shot, task.support.y
        dim, width = x.shape[1], max(1, round(self.hidden * x.shape[1]))
        generator = torch.Generator().manual_seed(task.seed)
        weights = [
            ((2 * torch.rand(rows, columns, generator=generator) - 1) / fan_in**0.5).requires_grad_()
            for fan_in, outputs in ((dim, width), (width, task.num_classes))
            for rows, columns in ((outputs, fan_in), (1, outputs))
        ]

        def loss(rows: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
            bias = self._forward(x[rows], weights)
            fused = cross_entropy(zero_shot[rows] + self.beta * bias, y[rows])
            return (1 - self.lam) * cross_entropy(bias, y[rows]) + self.lam * fused

        optimiser = torch.optim.AdamW(weights, weight_decay=self.weight_decay, eps=1e-4)
        rates = training.cosine(self.lr, self.epochs * math.ceil(len(y) / self.batch_size))
        self.losses_ = training.minimise(loss, optimiser, row_orders(task, self.epochs), self.batch_size, rates)
        self.weights_ = [weight.detach() for weight in weights]
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return self._forward(split.features(self.features), self.weights_)

    @staticmethod
    def _forward(x: Float[Tensor, "n D"], weights: Sequence[Tensor]) -> Float[Tensor, "n C"]:
        first, first_bias, second, second_bias = weights
        return torch.relu(x @ first.T + first_bias) @ second.T + second_bias


@dataclass(eq=False)
class GDA(Predictor):
    """Gaussian discriminant analysis: classes share one covariance, estimated with shrinkage, in closed form.

        P = D ((n - 1) S + tr(S) I)^-1,    W = mu P,    b_c = -log C - mu_c^T P mu_c / 2,    bias = x W^T + b

    mu are the class means and S is the covariance of the centred rows. S already divides by n - 1, so (n - 1) S is
    the scatter, as in the authors' code. With one image per class the scatter is 0, P has no finite value and the
    identity takes its place. The prior is 1 / C whatever the number of images of a class. Augmented views, where a
    task has them, count as more images.

    Source: "A hard-to-beat baseline for training-free CLIP-based adaptation" (arXiv 2402.04087), eq. 6-8;
        repository mrflogs/ICLR24, `main_few_shots.py`.
    """

    features: str = "clip"

    def fit(self, task: FewShotTask) -> GDA:
        self.check(task)
        views = task.views or (task.support,)
        x = torch.cat([view.features(self.features) for view in views]).double()
        y = torch.cat([view.y for view in views])
        mean = metrics.class_means(x, y, task.num_classes)
        centred = x - mean[y]
        scatter, dim = centred.T @ centred, x.shape[1]
        shrinkage = scatter.trace() / (len(x) - 1)
        if shrinkage <= len(x) * torch.finfo(torch.float32).eps ** 2:
            precision_mean = mean
        else:
            factor = torch.linalg.cholesky(scatter + shrinkage * torch.eye(dim, dtype=x.dtype))
            precision_mean = dim * torch.cholesky_solve(mean.T, factor).T
        self.weight_ = precision_mean.float()
        self.intercept_ = (-math.log(task.num_classes) - (mean * precision_mean).sum(1) / 2).float()
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return split.features(self.features) @ self.weight_.T + self.intercept_
