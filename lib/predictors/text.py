"""Predictors that learn in the space CLIP's images and texts share: their logits contain `s0` and replace it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from lib import metrics
from lib.predictors import training
from lib.predictors.base import Predictor, random_weight, row_orders
from lib.predictors.training import Orders
from lib.splits import LOGIT_SCALE, Split
from lib.tasks import FewShotTask


@dataclass(eq=False)
class TextTuned(Predictor):
    """Training by CoOp's recipe: cross-entropy, batches without remainder, a warmed-up cosine."""

    clip_only: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True
    features: str = "clip"
    lr: float = 2e-3
    epochs: int = 200
    batch_size: int = 256

    def _train(
        self,
        task: FewShotTask,
        optimiser: torch.optim.Optimizer,
        forward: Callable[[Float[Tensor, "b D"]], Float[Tensor, "b C"]],
        orders: Orders | None,
        penalty: Callable[[], Float[Tensor, ""] | float] = lambda: 0.0,
    ) -> None:
        x, y = task.support.clip, task.support.y
        batch = min(self.batch_size, len(y))
        steps = len(y) // batch  # of an epoch
        rates = training.warmed_cosine(self.lr, self.epochs, steps)
        orders = (row_orders(task, self.epochs) if orders is None else orders)[:, : steps * batch]

        def loss(rows: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
            return cross_entropy(forward(x[rows]), y[rows]) + penalty()

        self.losses_ = training.minimise(loss, optimiser, orders, batch, rates)


@dataclass(eq=False)
class CLIPAdapter(TextTuned):
    """CLIP-Adapter: a bottleneck moves each image feature a little before it meets the texts.

        h = ratio relu(W2 relu(W1 f)) + (1 - ratio) f,    logits = 100 unit(h) T^T,    W1 [D/4, D], W2 [D, D/4]

    SGD's rate (momentum 0.9) and decay are ours, large enough to move unit features: the authors ship no configuration.

    Source: CLIP-Adapter (arXiv 2110.04544), eq. 3-6, image side; repository gaopengcuhk/CLIP-Adapter (second ReLU).
    """

    ratio: float = 0.2  # weight of the adapted feature, in [0, 1]; 0 gives zero-shot CLIP back
    lr: float = 0.05
    weight_decay: float = 5e-4

    def fit(self, task: FewShotTask, start: Sequence[Tensor] = (), orders: Orders | None = None) -> CLIPAdapter:
        self.check(task)
        dim, hidden = task.text.shape[1], max(1, task.text.shape[1] // 4)
        start = start or (random_weight(task, (hidden, dim)), random_weight(task, (dim, hidden)))
        self.text_, weights = task.text, [weight.clone().requires_grad_() for weight in start]
        optimiser = torch.optim.SGD(weights, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        self._train(task, optimiser, lambda x: self._forward(x, *weights), orders)
        self.down_, self.up_ = (weight.detach() for weight in weights)
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return self._forward(split.clip, self.down_, self.up_)

    def _forward(self, x: Float[Tensor, "n D"], down: Tensor, up: Tensor) -> Float[Tensor, "n C"]:
        adapted = torch.relu(torch.relu(x @ down.T) @ up.T)
        return LOGIT_SCALE * normalize(self.ratio * adapted + (1 - self.ratio) * x, dim=1) @ self.text_.T


@dataclass(eq=False)
class TaskRes(TextTuned):
    """TaskRes: a free residual for each class text.

        logits = 100 f unit(t_c + scale x_c)^T,    x starts at 0

    Trained by Adam; the L2 penalty 5e-4 in its gradient is Dassl's default.

    Source: TaskRes (arXiv 2211.10277), eq. 4; repository geekyutao/TaskRes, configuration `adam_lr2e-3_B256_ep200`.
    """

    scale: float = 0.5  # 0 gives zero-shot CLIP back

    def fit(self, task: FewShotTask, orders: Orders | None = None) -> TaskRes:
        self.check(task)
        self.text_, residual = task.text, torch.zeros_like(task.text, requires_grad=True)
        optimiser = torch.optim.Adam([residual], lr=self.lr, weight_decay=5e-4)
        self._train(task, optimiser, lambda x: self._forward(x, residual), orders)
        self.residual_ = residual.detach()
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return self._forward(split.clip, self.residual_)

    def _forward(self, x: Float[Tensor, "n D"], residual: Float[Tensor, "C D"]) -> Float[Tensor, "n C"]:
        return LOGIT_SCALE * x @ normalize(self.text_ + self.scale * residual, dim=1).T


@dataclass(eq=False)
class TextProbe(TextTuned):
    """Prototypes that start at the class texts, free or drawn towards them (CLAP).

        logits = 100 f unit(w_c)^T,    loss = CE + (1/C) sum_c lambda_c ||w_c - text_norm t_c||^2

    lambda_c is the mean zero-shot probability of c over the support images of class c. The penalty is on texts before
    normalisation, `text_norm` long: on unit rows the authors' learning rate is unstable and their penalty too weak.

    Source: CLAP (arXiv 2312.12730), eq. 5-9, without the outer steps its paper drops; repository jusiro/CLAP.
    """

    constraint: str = "none"  # or how lambda is normalised, see `_multipliers`
    text_norm: float = 8.0  # length of the texts before normalisation; CLIP's are 7 to 10
    lr: float = 0.1  # of SGD with momentum 0.9
    epochs: int = 300

    def fit(self, task: FewShotTask, start: Tensor | None = None, orders: Orders | None = None) -> TextProbe:
        self.check(task)
        self.multipliers_ = self._multipliers(task)
        start = self.text_norm * task.text if start is None else start
        weight = start.clone().requires_grad_()
        optimiser = torch.optim.SGD([weight], lr=self.lr, momentum=0.9)
        self._train(task, optimiser, lambda x: self._forward(x, weight), orders, lambda: self.penalty(weight, start))
        self.weight_ = weight.detach()
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return self._forward(split.clip, self.weight_)

    def penalty(self, weight: Float[Tensor, "C D"], start: Float[Tensor, "C D"]) -> Float[Tensor, ""]:
        """(1/C) sum_c lambda_c ||w_c - start_c||^2."""
        return (self.multipliers_ * (weight - start).square().sum(1)).mean()

    def _multipliers(self, task: FewShotTask) -> Float[Tensor, " C"]:
        p = task.support.zero_shot.softmax(1)
        correct_p = metrics.class_means(p, task.support.y, task.num_classes).diagonal()
        multipliers = {
            "none": torch.zeros_like(correct_p),
            "l2": correct_p,
            "l2-balanced": torch.ones_like(correct_p),
            "l2-corrected": correct_p / correct_p.mean(),
            "l2-constant": correct_p.mean().expand_as(correct_p),
        }
        if self.constraint not in multipliers:
            raise ValueError(f"constraint is one of {', '.join(multipliers)}, not {self.constraint!r}")
        return multipliers[self.constraint]

    def _forward(self, x: Float[Tensor, "n D"], weight: Float[Tensor, "C D"]) -> Float[Tensor, "n C"]:
        return LOGIT_SCALE * x @ normalize(weight, dim=1).T


@dataclass(eq=False)
class SSText(Predictor):
    """SS-Text: each class text moves towards its images, in closed form; nothing is trained and nothing chosen.

        logits = 100 x unit(w_c)^T,    w_c = t_c + 100 / (N lambda_c) sum_i x_i,    i the n_c images of class c of all N

    lambda_c is 1 / n_c, or with `balanced` 1 / N. (The released code keeps it above 0.001.)

    Source: repository jusiro/SS-Text at 845ba01, `solvers/sstext.py`.
    """

    clip_only: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True
    features: str = "clip"
    balanced: bool = False

    def fit(self, task: FewShotTask) -> SSText:
        self.check(task)
        sums, n = torch.zeros_like(task.text).index_add(0, task.support.y, task.support.clip), len(task.support)
        weight = torch.full((task.num_classes,), float(n)) if self.balanced else task.counts.float()  # 1 / lambda
        self.weight_ = normalize(task.text + LOGIT_SCALE / n * weight[:, None] * sums, dim=1)
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return LOGIT_SCALE * split.clip @ self.weight_.T


@dataclass(eq=False)
class CrossModal(Predictor):
    """Cross-modal adaptation: class texts are training samples like images, half of every batch each.

        logits = 100 f W^T,    W starts at T and is not normalised,    at the end W <- wise W + (1 - wise) T

    AdamW's rate rises for `warm_up` steps, then falls along a cosine of the full length, which it does not finish.

    Source: cross-modal adaptation (arXiv 2301.06267), eq. 3-5; repository linzhiqiu/cross_modal_adaptation.
    """

    clip_only: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True
    features: str = "clip"
    wise: float = 0.5  # weight of the trained W in the average with the texts (WiSE-FT); 1 keeps it alone
    texts: bool = True  # False trains on images only, the authors' uni-modal baseline
    lr: float = 1e-3
    weight_decay: float = 0.01
    iterations: int = 12800
    warm_up: int = 50
    batch_size: int = 8  # half of them images
    evaluate_every: int = 100  # steps; the first weights that are best on `task.val` are kept, without it the last ones

    def fit(
        self, task: FewShotTask, orders: Orders | None = None, text_orders: Int64[Tensor, "passes C"] | None = None
    ) -> CrossModal:
        self.check(task)
        n, classes, best, best_accuracy = len(task.support), task.num_classes, None, -1.0
        x = LOGIT_SCALE * torch.cat([task.support.clip, task.text])
        y = torch.cat([task.support.y, torch.arange(classes)])
        rows = self._half_batches(n, orders, task.seed)
        if self.texts:
            rows = torch.cat([rows, n + self._half_batches(classes, text_orders, task.seed + 1)], dim=1)

        def evaluate(step: int, _: slice, weight: Float[Tensor, "1 C D"]) -> None:
            nonlocal best, best_accuracy
            if task.val is None or step % self.evaluate_every:
                return
            accuracy = metrics.accuracy(task.val.clip @ weight[0].T, task.val.y)
            if accuracy > best_accuracy:
                best, best_accuracy = weight[0].clone(), accuracy

        data = x[None], torch.zeros(1, len(x), classes), y, task.text[None], rows  # each step an epoch of one batch
        adamw = {"lr": self.lr, "weight_decay": self.weight_decay, "eps": 1e-8, "rates": self.rates()}
        trained = training.train_heads(*data, **adamw, lam=0.0, batch_size=rows.shape[1], watch=evaluate)
        self.losses_ = trained.losses[0, :, 2]
        weight = trained.weight[0] if best is None else best
        self.weight_ = self.wise * weight + (1 - self.wise) * task.text
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return LOGIT_SCALE * split.clip @ self.weight_.T

    def rates(self) -> Float[Tensor, " T"]:
        """What `lr` is multiplied by at each step."""
        step = torch.arange(self.iterations, dtype=torch.float64)
        cosine = (1 + torch.cos(math.pi * (step - self.warm_up) / self.iterations)) / 2
        rates = torch.where(step < self.warm_up, step / max(1, self.warm_up), cosine)
        rates[0] = 1e-5 / self.lr
        return rates.float()

    def _half_batches(self, n: int, orders: Int64[Tensor, "passes n"] | None, seed: int) -> Int64[Tensor, "T b"]:
        """Half a batch for each step, from passes over n rows without their remainders."""
        size = min(max(1, self.batch_size // 2), n)
        if orders is None:
            passes = math.ceil(self.iterations / (n // size))
            orders = training.epoch_orders(n, passes, torch.Generator().manual_seed(seed))
        return orders[:, : n // size * size].reshape(-1, size)[: self.iterations]


@dataclass(eq=False)
class LPPlusPlus(Predictor):
    """LP++: a linear probe and the class texts, mixed by a learned weight for each class.

        logits = x W^T + b + alpha_c cos(f, t_c)

    Full-batch descent on the mean cross-entropy: W and b with momentum 0.9 and step 4 n / lambda_max(X^T X), alpha at
    every tenth with n / (4 max_c sum_i cos(f_i, t_c)^2) and, as released, the sum of all gradients so far. W starts at
    the class sums, alpha at 250 times the mean cosine of an image to its text, b (random in the authors' code) at 0.

    The weights with the best accuracy on `task.val` are kept, the latest of equals; without it the last ones.

    Source: LP++ (arXiv 2404.02285), eq. 4-13; repository FereshteShakeri/FewShot-CLIP-Strong-Baseline.
    """

    needs_text: ClassVar[bool] = True
    features: str = "clip"  # of the probe; the text term always uses CLIP's cosine
    iterations: int = 300

    def fit(self, task: FewShotTask, intercept: Float[Tensor, " C"] | None = None) -> LPPlusPlus:
        self.check(task)
        support, n = task.support, len(task.support)
        x, cosine = support.features(self.features), support.zero_shot / LOGIT_SCALE
        labels = one_hot(support.y, task.num_classes).float()
        alpha = torch.full((task.num_classes,), 250 * (cosine * labels).sum().item() / n)
        rate = 4 * n / torch.linalg.matrix_norm(x, ord=2).square()
        alpha_rate = n / (4 * cosine.square().sum(0).max())
        weight, intercept = labels.T @ x, torch.zeros_like(alpha) if intercept is None else intercept
        velocity, intercept_velocity = torch.zeros_like(weight), torch.zeros_like(intercept)
        alpha_gradient, best, losses = torch.zeros_like(alpha), -1.0, []
        for step in range(1, self.iterations + 1):
            log_p = (x @ weight.T + intercept + alpha * cosine).log_softmax(1)
            losses.append(-(labels * log_p).sum(1).mean())
            gradient = (log_p.exp() - labels) / n
            alpha_gradient += (gradient * cosine).sum(0)
            velocity = 0.9 * velocity + gradient.T @ x
            intercept_velocity = 0.9 * intercept_velocity + gradient.sum(0)
            weight, intercept = weight - rate * velocity, intercept - rate * intercept_velocity
            alpha = alpha - alpha_rate * alpha_gradient if step % 10 == 0 else alpha
            current = weight, intercept, alpha
            accuracy = 0.0 if task.val is None else metrics.accuracy(self._forward(task.val, *current), task.val.y)
            if accuracy >= best:
                best, (self.weight_, self.intercept_, self.alpha_) = accuracy, current
        self.losses_ = torch.stack(losses)
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return self._forward(split, self.weight_, self.intercept_, self.alpha_)

    def _forward(self, split: Split, weight: Tensor, intercept: Tensor, alpha: Tensor) -> Float[Tensor, "n C"]:
        return split.features(self.features) @ weight.T + intercept + alpha * split.zero_shot / LOGIT_SCALE
