"""Heads on features: AMU-Tuning's linear head, trained or solved, a perceptron, logistic regression, GDA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib import fusion, metrics
from lib.predictors import convex, training
from lib.predictors.base import GroupPredictor, Predictor, initial_weight, row_orders
from lib.predictors.training import Orders
from lib.splits import Split
from lib.tasks import FewShotTask

PER_HEAD = ("init", "lam", "beta", "confidence", "rho", "on", "constant", "select_epoch", "keep_epochs")


@dataclass(eq=False)
class TwoBranchHead(GroupPredictor):
    """Linear heads on AMU-Tuning's loss, (1 - lam) CE(a, y) + lam CE(s0 + beta u(s0) a, y).

    beta, confidence, rho, on and constant are the loss's, whatever the fusion of a method is; see `fusion.uncertain`.
    """

    standardised: ClassVar[bool] = False  # a z-score is not convex; a trained head may have it
    lam: float = 0.5  # weight of the fused branch in [0, 1]; 0 needs no class texts
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

    If the task has augmented views, each visit of an image takes one of them at random.

    Source: AMU-Tuning, eq. 6-11, and repository TJU-sjyj/AMU-Tuning.
    """

    varying = PER_HEAD
    init: str = "mean"  # start of W, see `initial_weight`
    standardised: bool = False  # z-score the bias of each image, in both branches and in what `logits` returns
    lr: float = 1e-3  # of AdamW (eps 1e-4) with a cosine per step, as what follows
    weight_decay: float = 0.01
    epochs: int = 50
    batch_size: int = 8
    select_epoch: bool = False  # keep the epoch with the best fused accuracy on `task.val`, if any; the first of equals
    keep_epochs: bool = False  # leave the weights after each epoch in `epoch_weights_`, for training curves

    @classmethod
    def fit_group(cls, task: FewShotTask, group: Sequence[MultiBranchHead], orders: Orders | None = None) -> None:
        """Train; `orders` takes the place of the seeded order of the rows."""
        first, views, best = group[0], task.views or (task.support,), {}
        generator = torch.Generator().manual_seed(task.seed)
        seeded = training.epoch_orders(len(task.support), first.epochs, generator)
        orders = seeded if orders is None else orders
        for head in group:
            head.epoch_weights_ = []

        def keep(_: int, trained: slice, weights: Float[Tensor, "b C D"]) -> None:
            for head, weight in zip(group[trained], weights, strict=True):
                if head.keep_epochs:
                    head.epoch_weights_.append(weight.clone())
                if head.select_epoch and task.val is not None:
                    accuracy = metrics.accuracy(head.branches(task.val, weight)[1], task.val.y)
                    if accuracy > best.get(head, (-1.0, None))[0]:
                        best[head] = (accuracy, weight.clone())

        trained = training.train_heads(
            torch.stack([view.features(first.features) for view in views]),
            torch.stack([view.zero_shot for view in views]),
            task.support.y,
            torch.stack([initial_weight(task, head.features, head.init) for head in group]),
            orders,
            lam=[head.lam for head in group],
            beta=[head.beta for head in group],
            u=torch.stack([torch.stack([head.u(view) for view in views]) for head in group]),
            picks=torch.randint(len(views), orders.shape, generator=generator),
            watch=keep if any(head.keep_epochs or head.select_epoch for head in group) else None,
            **{name: getattr(first, name) for name in ("lr", "weight_decay", "standardised", "batch_size")},
        )
        for head, weight, losses in zip(group, trained.weight, trained.losses, strict=True):
            head.losses_, head.weight_ = losses, best.get(head, (1.0, weight))[1]


@dataclass(eq=False)
class ConvexHead(TwoBranchHead):
    """AMU-Tuning's linear head at the optimum of its two-branch loss, which is convex without the z-score.

        mean_i [(1 - lam) CE(W g_i, y_i) + lam CE(s0_i + beta u(s0_i) W g_i, y_i)] + penalty / 2 ||W||^2

    The penalty does what 50 epochs from the class means do in the paper: it keeps W small. No order, no rate, no seed.
    """

    varying = ("penalty",)
    penalty: float = 1e-3  # above 0
    tolerance: float = 1e-3  # `gradient_norm_` to stop at, relative to the one at W = 0

    @classmethod
    def fit_group(cls, task: FewShotTask, group: Sequence[ConvexHead]) -> None:
        first, support, penalties = group[0], task.support, [head.penalty for head in group]
        settings = {"lam": first.lam, "u": first.beta * first.u(support), "tolerance": first.tolerance}
        x = support.features(first.features)
        solved = convex.solve_path(x, support.zero_shot, support.y, penalties, **settings)
        for i, head in enumerate(group):
            head.weight_, head.gradient_norm_ = solved.weight[i], solved.gradient_norms[i].item()
            head.evaluations_ = solved.evaluations[i].item()


@dataclass(eq=False)
class LinearProbe(GroupPredictor):
    """Multinomial logistic regression on the features, without class texts.

        loss = sum_i CE(W x_i + b, y_i) + ||W||^2 / (2 inverse_penalty)

    Source: the linear probe of CLIP (Radford et al., 2021); agrees with scikit-learn's, see the tests.
    """

    varying = ("inverse_penalty",)
    features: str = "clip"
    inverse_penalty: float = 10.0  # scikit-learn's `C`, above 0

    @classmethod
    def fit_group(cls, task: FewShotTask, group: Sequence[LinearProbe]) -> None:
        x, support = task.support.features(group[0].features).double(), task.support
        penalties = [1 / (probe.inverse_penalty * len(x)) for probe in group]
        solved = convex.solve_path(x, support.zero_shot, support.y, penalties, intercept=True, tolerance=1e-6)
        for i, probe in enumerate(group):
            probe.weight_, probe.intercept_ = solved.weight[i].float(), solved.intercept[i].float()
            probe.gradient_norm_ = solved.gradient_norms[i].item()

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return split.features(self.features) @ self.weight_.T + self.intercept_


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

        optimiser = torch.optim.AdamW(weights, lr=self.lr, weight_decay=self.weight_decay, eps=1e-4)
        self.losses_ = training.minimise(loss, optimiser, row_orders(task, self.epochs), self.batch_size)
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
        x, y = torch.cat([view.features(self.features) for view in views]).double(), task.support.y.repeat(len(views))
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
