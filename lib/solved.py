"""Linear heads that are solved, not trained: no data order, no learning rate, no seed.

Each is the closed form or the unique optimum of what it minimises, so two people get the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lib import convex, fusion, training
from lib.predictors import JointPredictor, Predictor
from lib.tasks import FewShotTask, Split


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
        mean = training.class_means(x, y, task.num_classes)
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
