"""Peers that learn in the space CLIP's images and texts share: their logits hold the zero-shot knowledge already.

All of them are `predictors.Predictor`s whose methods replace `s0` by what they return. They compare images with class
texts, so most of them run on features `clip` only and say so otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from lib import fusion, metrics
from lib.predictors import training
from lib.predictors.base import Predictor, random_weight
from lib.tasks import LOGIT_SCALE, FewShotTask, Split

CONSTRAINTS = ("none", "l2", "l2-balanced", "l2-corrected", "l2-constant")


class TextTuned(Predictor):
    """What peers trained by CoOp's recipe share: cross-entropy, batches without remainder, a warmed-up cosine."""

    lr: float
    epochs: int
    batch_size: int

    def _train(
        self,
        task: FewShotTask,
        optimiser: torch.optim.Optimizer,
        forward: Callable[[Float[Tensor, "b D"]], Float[Tensor, "b C"]],
        penalty: Callable[[], Float[Tensor, ""] | float] = lambda: 0.0,
    ) -> None:
        x, y = task.support.clip, task.support.y
        batch = min(self.batch_size, len(y))

        def loss(rows: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
            return cross_entropy(forward(x[rows]), y[rows]) + penalty()

        rates = training.warmed_cosine(self.lr, self.epochs, len(y) // batch)
        orders = self._orders(task, self.epochs)
        self.losses_ = training.minimise(loss, optimiser, orders, batch, rates, drop_last=True)


class CLIPAdapter(TextTuned):
    """CLIP-Adapter: a bottleneck moves each image feature a little before it meets the texts.

        h = ratio relu(W2 relu(W1 f)) + (1 - ratio) f,    logits = 100 unit(h) T^T,    W1 [D/4, D], W2 [D, D/4]

    Args:
        features: `clip`.
        ratio: share of the adapted feature, in [0, 1]; 0 gives zero-shot CLIP back.
        lr, weight_decay, epochs, batch_size: of SGD with momentum 0.9 and CoOp's schedule. The authors ship no
            training configuration: these are ours, and large enough to move the unit features of a frozen encoder.

    Source: CLIP-Adapter (arXiv 2110.04544), eq. 3-6, image side; repository gaopengcuhk/CLIP-Adapter (the second
        ReLU is theirs).
    """

    def __init__(
        self,
        features: str = "clip",
        ratio: float = 0.2,
        lr: float = 0.05,
        weight_decay: float = 5e-4,
        epochs: int = 200,
        batch_size: int = 256,
    ) -> None:
        self.features, self.ratio = features, ratio
        self.lr, self.weight_decay, self.epochs, self.batch_size = lr, weight_decay, epochs, batch_size

    def fit(self, task: FewShotTask) -> CLIPAdapter:
        self._refuse_other_features()
        self.text_ = task.text
        weights = [weight.clone().requires_grad_() for weight in self._initial(task)]
        optimiser = torch.optim.SGD(weights, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        self._train(task, optimiser, lambda x: self._forward(x, *weights))
        self.down_, self.up_ = (weight.detach() for weight in weights)
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return self._forward(split.clip, self.down_, self.up_)

    def _forward(
        self, x: Float[Tensor, "n D"], down: Float[Tensor, "h D"], up: Float[Tensor, "D h"]
    ) -> Float[Tensor, "n C"]:
        moved = torch.relu(torch.relu(x @ down.T) @ up.T)
        return LOGIT_SCALE * normalize(self.ratio * moved + (1 - self.ratio) * x, dim=1) @ self.text_.T

    @staticmethod
    def _initial(task: FewShotTask) -> tuple[Float[Tensor, "h D"], Float[Tensor, "D h"]]:
        dim = task.text.shape[1]
        return random_weight(task, (max(1, dim // 4), dim)), random_weight(task, (dim, max(1, dim // 4)))


class TaskRes(TextTuned):
    """TaskRes: a free residual for each class text.

        logits = 100 f unit(t_c + scale x_c)^T,    x starts at 0

    Args:
        features: `clip`.
        scale: of the residual; 0 gives zero-shot CLIP back.
        lr, epochs, batch_size: of Adam with CoOp's schedule; the L2 penalty 5e-4 in its gradient is Dassl's default.

    Source: TaskRes (arXiv 2211.10277), eq. 4; repository geekyutao/TaskRes, configuration `adam_lr2e-3_B256_ep200`.
    """

    def __init__(
        self, features: str = "clip", scale: float = 0.5, lr: float = 2e-3, epochs: int = 200, batch_size: int = 256
    ) -> None:
        self.features, self.scale, self.lr, self.epochs, self.batch_size = features, scale, lr, epochs, batch_size

    def fit(self, task: FewShotTask) -> TaskRes:
        self._refuse_other_features()
        residual = torch.zeros_like(task.text, requires_grad=True)
        optimiser = torch.optim.Adam([residual], lr=self.lr, weight_decay=5e-4)
        self._train(task, optimiser, lambda x: LOGIT_SCALE * x @ self._classes(task.text, residual).T)
        self.text_, self.residual_ = task.text, residual.detach()
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return LOGIT_SCALE * split.clip @ self._classes(self.text_, self.residual_).T

    def _classes(self, text: Float[Tensor, "C D"], residual: Float[Tensor, "C D"]) -> Float[Tensor, "C D"]:
        return normalize(text + self.scale * residual, dim=1)


class TextProbe(TextTuned):
    """Prototypes that start at the class texts, free or held near them (CLAP).

        logits = 100 f unit(w_c)^T,    loss = CE + (1/C) sum_c lambda_c ||w_c - text_norm t_c||^2

    lambda_c is the mean zero-shot probability that the support images of class c have for c: what CLIP knows well is
    held firmly. The penalty lives in the space of texts before their normalisation, whose rows are `text_norm` long;
    on unit rows the authors' learning rate is unstable and their penalty too weak.

    Args:
        features: `clip`.
        constraint: `none`; `l2`; `l2-balanced`, all lambda 1; `l2-corrected`, lambda C / sum(lambda); `l2-constant`,
            their mean.
        text_norm: length of the texts before normalisation; CLIP's are 7 to 10.
        lr, epochs, batch_size: of SGD with momentum 0.9 and CoOp's schedule.

    Source: CLAP (arXiv 2312.12730), eq. 5-9, without the outer steps its paper drops; repository jusiro/CLAP.
    """

    def __init__(
        self,
        features: str = "clip",
        constraint: str = "none",
        text_norm: float = 8.0,
        lr: float = 0.1,
        epochs: int = 300,
        batch_size: int = 256,
    ) -> None:
        self.features, self.constraint, self.text_norm = features, constraint, text_norm
        self.lr, self.epochs, self.batch_size = lr, epochs, batch_size

    def fit(self, task: FewShotTask) -> TextProbe:
        self._refuse_other_features()
        self.multipliers_ = self._multipliers(task)
        start = self._start(task)
        weight = start.clone().requires_grad_()
        optimiser = torch.optim.SGD([weight], lr=self.lr, momentum=0.9)
        self._train(task, optimiser, lambda x: self._forward(x, weight), lambda: self.penalty(weight, start))
        self.weight_ = weight.detach()
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return self._forward(split.clip, self.weight_)

    def penalty(self, weight: Float[Tensor, "C D"], start: Float[Tensor, "C D"]) -> Float[Tensor, ""]:
        """Return `(1/C) sum_c lambda_c ||w_c - start_c||^2`."""
        return (self.multipliers_ * (weight - start).square().sum(1)).mean()

    def _multipliers(self, task: FewShotTask) -> Float[Tensor, " C"]:
        if self.constraint not in CONSTRAINTS:
            raise ValueError(f"constraint is one of {', '.join(CONSTRAINTS)}, not {self.constraint!r}")
        support = task.support
        known = metrics.class_means(support.zero_shot.softmax(1), support.y, task.num_classes).diagonal()
        return {
            "none": torch.zeros_like(known),
            "l2": known.clone(),
            "l2-balanced": torch.ones_like(known),
            "l2-corrected": known * len(known) / known.sum(),
            "l2-constant": known.mean().expand_as(known),
        }[self.constraint]

    def _start(self, task: FewShotTask) -> Float[Tensor, "C D"]:
        return self.text_norm * task.text

    @staticmethod
    def _forward(x: Float[Tensor, "n D"], weight: Float[Tensor, "C D"]) -> Float[Tensor, "n C"]:
        return LOGIT_SCALE * x @ normalize(weight, dim=1).T


class CrossModal(Predictor):
    """Cross-modal adaptation: class texts are training samples like images, half of every batch each.

        logits = 100 f W^T,    W starts at T and is not normalised,    at the end W <- wise W + (1 - wise) T

    Args:
        features: `clip`.
        wise: share of the trained weights in the average with the texts (WiSE-FT); 1 keeps them alone.
        texts: False trains on images only, the authors' uni-modal baseline.
        lr, weight_decay, iterations, warm_up, batch_size: of AdamW; the rate climbs for `warm_up` steps, then falls
            along a cosine of the full length, which it does not finish. Half of the batch are images.
        evaluate_every: steps between looks at `task.val`; the first best weights are kept, the last ones without it.

    Source: cross-modal adaptation (arXiv 2301.06267), eq. 3-5; repository linzhiqiu/cross_modal_adaptation.
    """

    def __init__(
        self,
        features: str = "clip",
        wise: float = 0.5,
        texts: bool = True,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        iterations: int = 12800,
        warm_up: int = 50,
        batch_size: int = 8,
        evaluate_every: int = 100,
    ) -> None:
        vars(self).update({name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def fit(self, task: FewShotTask) -> CrossModal:
        self._refuse_other_features()
        x = LOGIT_SCALE * torch.cat([task.support.clip, task.text])
        y = torch.cat([task.support.y, torch.arange(task.num_classes)])
        best, best_accuracy = None, -1.0
        rows = self._batches(task)

        def look(_: slice, weight: Float[Tensor, "1 C D"]) -> None:
            nonlocal best, best_accuracy
            accuracy = metrics.accuracy(task.val.clip @ weight[0].T, task.val.y)
            if accuracy > best_accuracy:
                best, best_accuracy = weight[0].clone(), accuracy

        trained = training.train_heads(
            x[None],
            torch.zeros(1, len(x), task.num_classes),
            y,
            task.text[None],
            rows.view(1, 1, -1),
            lr=self.lr,
            weight_decay=self.weight_decay,
            lam=0.0,
            batch_size=rows.shape[1],
            eps=1e-8,
            rates=self._rates(),
            watched=() if task.val is None else range(1, self.iterations + 1, self.evaluate_every),
            watch=look,
        )
        self.losses_ = trained.losses[0, :, 2]
        weight = trained.weight[0] if best is None else best
        self.weight_ = self.wise * weight + (1 - self.wise) * task.text
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return LOGIT_SCALE * split.clip @ self.weight_.T

    def _rates(self) -> Float[Tensor, " T"]:
        """Return what `lr` is multiplied by at each step."""
        step = torch.arange(self.iterations, dtype=torch.float64)
        fall = (1 + torch.cos(math.pi * (step - self.warm_up) / self.iterations)) / 2
        rates = torch.where(step < self.warm_up, step / max(1, self.warm_up), fall)
        rates[0] = 1e-5 / self.lr
        return rates.float()

    def _batches(self, task: FewShotTask) -> Int64[Tensor, "T b"]:
        """Return the rows of each step, images first, then texts (counted on from the images)."""
        half = max(1, self.batch_size // 2)
        images = self._stream(self._orders(task, self._passes(len(task.support), half)), half)
        if not self.texts:
            return images
        generator = torch.Generator().manual_seed(task.seed + 1)
        texts = self._stream(self._text_orders(task, self._passes(task.num_classes, half), generator), half)
        return torch.cat([images, len(task.support) + texts], dim=1)

    def _passes(self, n: int, half: int) -> int:
        return math.ceil(self.iterations / (n // min(half, n)))

    def _stream(self, orders: Int64[Tensor, "epochs n"], half: int) -> Int64[Tensor, "T b"]:
        size = min(half, orders.shape[1])
        kept = orders[:, : orders.shape[1] // size * size]
        return kept.reshape(-1, size)[: self.iterations]

    @staticmethod
    def _text_orders(task: FewShotTask, epochs: int, generator: torch.Generator) -> Int64[Tensor, "epochs C"]:
        return training.epoch_orders(task.num_classes, epochs, generator)


class LPPlusPlus(Predictor):
    """LP++: a linear probe and the class texts, mixed by a learned weight for each class.

        logits = x W^T + b + a_c cos(f, t_c)

    All is learned from the full batch with mean cross-entropy: W and b by gradient descent with momentum 0.9 and step
    4 n / lambda_max(X^T X), a every tenth step by n / (4 max_c sum_i cos(f_i, t_c)^2). W starts at the class sums and
    a at 250 times the mean cosine of an image to its text. As released, the gradient of a is never cleared: its k-th
    step uses the sum of all gradients so far. The authors' b starts at random numbers; here at 0, which treats all
    classes alike.

    Args:
        features: of the probe, `clip`, `aux` or `clip+aux`; the text term always uses CLIP's cosine.
        iterations: steps of the full batch; the weights with the best accuracy on `task.val` are kept, the latest of
            equals, or the last ones without validation images.

    Source: LP++ (arXiv 2404.02285), eq. 4-13; repository FereshteShakeri/FewShot-CLIP-Strong-Baseline.
    """

    def __init__(self, features: str = "clip", iterations: int = 300) -> None:
        self.features, self.iterations = features, iterations

    def fit(self, task: FewShotTask) -> LPPlusPlus:
        support, n = task.support, len(task.support)
        x, cosine = support.features(self.features), support.zero_shot / LOGIT_SCALE
        hot = torch.nn.functional.one_hot(support.y, task.num_classes).float()
        weight, intercept = hot.T @ x, self._initial_intercept(task)
        share = torch.full((task.num_classes,), 250 * (cosine * hot).sum().item() / n)
        rate = 4 * n / torch.linalg.matrix_norm(x, ord=2).square()
        share_rate = n / (4 * cosine.square().sum(0).max())
        speed, intercept_speed, share_slope = (
            torch.zeros_like(weight),
            torch.zeros_like(intercept),
            torch.zeros_like(share),
        )
        best, losses = -1.0, []
        for step in range(self.iterations):
            log_p = (x @ weight.T + intercept + share * cosine).log_softmax(1)
            losses.append(-(hot * log_p).sum(1).mean())
            slope = (log_p.exp() - hot) / n
            share_slope += (slope * cosine).sum(0)
            speed = 0.9 * speed + slope.T @ x
            intercept_speed = 0.9 * intercept_speed + slope.sum(0)
            weight, intercept = weight - rate * speed, intercept - rate * intercept_speed
            if (step + 1) % 10 == 0:
                share = share - share_rate * share_slope
            if task.val is None:
                self.weight_, self.intercept_, self.share_ = weight, intercept, share
                continue
            held = metrics.accuracy(self._forward(task.val, weight, intercept, share), task.val.y)
            if held >= best:
                best, self.weight_, self.intercept_, self.share_ = held, weight, intercept, share
        self.losses_ = torch.stack(losses)
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return self._forward(split, self.weight_, self.intercept_, self.share_)

    def _forward(
        self, split: Split, weight: Float[Tensor, "C D"], intercept: Float[Tensor, " C"], share: Float[Tensor, " C"]
    ) -> Float[Tensor, "n C"]:
        return split.features(self.features) @ weight.T + intercept + share * split.zero_shot / LOGIT_SCALE

    @staticmethod
    def _initial_intercept(task: FewShotTask) -> Float[Tensor, " C"]:
        return torch.zeros(task.num_classes)
