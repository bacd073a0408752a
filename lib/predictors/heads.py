"""Linear heads that are solved, not trained: no data order, no learning rate, no seed.

Each is the closed form or the unique optimum of what it minimises, so two people get the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib import fusion, metrics
from lib.predictors import convex, training
from lib.predictors.base import JointPredictor, Predictor, initial_weight
from lib.tasks import FewShotTask, Split


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
        return metrics.accuracy(self.branches(split, weight)[1], split.y)

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


class LinearProbe(JointPredictor):
    """Multinomial logistic regression on the features, without knowledge of the texts.

        loss = sum_i CE(W x_i + b, y_i) + ||W||^2 / (2 inverse_penalty)

    Args:
        features: `clip`, `aux` or `clip+aux`.
        inverse_penalty: scikit-learn's `C`, the inverse of the L2 penalty, above 0.

    Source: the linear probe of CLIP (Radford et al., 2021); agrees with scikit-learn's, see the tests.
    """

    varying = frozenset(("inverse_penalty",))

    def __init__(self, features: str = "clip", inverse_penalty: float = 10.0) -> None:
        self.features = features
        self.inverse_penalty = inverse_penalty

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return split.features(self.features) @ self.weight_.T + self.intercept_

    @classmethod
    def _fit_together(cls, task: FewShotTask, probes: Sequence[LinearProbe]) -> None:
        x, support = task.support.features(probes[0].features).double(), task.support
        penalties = [1 / (probe.inverse_penalty * len(x)) for probe in probes]
        solved = convex.solve_path(x, support.zero_shot, support.y, penalties, intercept=True, tolerance=1e-6)
        for i, probe in enumerate(probes):
            probe.weight_, probe.intercept_ = solved.weight[i].float(), solved.intercept[i].float()
            probe.gradient_norm_ = solved.gradient_norms[i].item()


class ConvexHead(JointPredictor):
    """AMU-Tuning's linear head at the optimum of its two-branch loss, which is convex without the z-score.

        mean_i [(1 - lam) CE(W g_i, y_i) + lam CE(s0_i + beta u(s0_i) W g_i, y_i)] + penalty / 2 ||W||^2

    The penalty does what 50 epochs from the class means do in the paper: it keeps W small. No order, no rate, no seed.

    Args:
        features: `clip`, `aux` or `clip+aux`.
        penalty: above 0.
        lam: weight of the fused branch in [0, 1].
        beta, confidence, rho, on, constant: the fusion inside the second branch, see `fusion.uncertain`.
        tolerance: norm of the gradient to stop at, relative to the one at W = 0; `gradient_norm_` is what was reached,
            after `evaluations_` gradients.
    """

    varying = frozenset(("penalty",))

    def __init__(
        self,
        features: str = "aux",
        penalty: float = 1e-3,
        lam: float = 0.5,
        beta: float = 1.0,
        confidence: str = "kurtosis",
        rho: float = 0.4,
        on: str = "logits",
        constant: float = 1.0,
        tolerance: float = 1e-3,
    ) -> None:
        vars(self).update({name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return split.features(self.features) @ self.weight_.T

    @classmethod
    def _fit_together(cls, task: FewShotTask, heads: Sequence[ConvexHead]) -> None:
        one, support = heads[0], task.support
        factor = fusion.uncertainty(support.zero_shot, one.confidence, one.rho, one.on, one.constant)
        solved = convex.solve_path(
            support.features(one.features),
            support.zero_shot,
            support.y,
            [head.penalty for head in heads],
            lam=one.lam,
            strength=one.beta * factor,
            tolerance=one.tolerance,
        )
        for i, head in enumerate(heads):
            head.weight_, head.gradient_norm_ = solved.weight[i], solved.gradient_norms[i].item()
            head.evaluations_ = solved.evaluations[i].item()


class GDA(Predictor):
    """Gaussian discriminant analysis: classes share one covariance, estimated with shrinkage, in closed form.

        P = D ((n - 1) S + tr(S) I)^-1,    W = mu P,    b_c = -log C - mu_c^T P mu_c / 2,    bias = x W^T + b

    mu are the class means and S is the covariance of the centred rows. S already divides by n - 1, so (n - 1) S is
    the scatter; the authors' code says so and is followed. With one image per class the scatter is 0, P has no
    finite value and the identity takes its place. Augmented views, where a task has them, count as more images.

    Args:
        features: `clip`, `aux` or `clip+aux`.

    Source: "A hard-to-beat baseline for training-free CLIP-based adaptation" (arXiv 2402.04087), eq. 6-8;
        repository mrflogs/ICLR24, `main_few_shots.py`.
    """

    def __init__(self, features: str = "clip") -> None:
        self.features = features

    def fit(self, task: FewShotTask) -> GDA:
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
