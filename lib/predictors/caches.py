"""Caches and kernel regression: an image is compared with every support image, affinity = x keys^T."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.polynomial.chebyshev import chebpts1, chebvander
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot
from torch.nn.utils.rnn import pad_sequence

from lib import fusion
from lib.predictors import training
from lib.predictors.base import GroupPredictor, Predictor, group_settings, random_weight, row_orders
from lib.splits import LOGIT_SCALE, Split
from lib.tasks import FewShotTask

CHUNK = 2048  # images compared with the whole support at a time, so that memory stays bounded


def class_sums(values: Float[Tensor, "n m"], counts: Int64[Tensor, " C"]) -> Float[Tensor, "n C"]:
    """`values one_hot` where columns stand class by class."""
    n, classes = len(values), len(counts)
    if bool((counts == counts[0]).all()):
        return values.view(n, classes, int(counts[0])).sum(-1)  # twice as quick as the general sum
    return values.new_zeros(n, classes).index_add(1, torch.arange(classes).repeat_interleave(counts), values)


def kernel(
    affinity: Float[Tensor, "*n m"], sharpness: float, log_weight: Tensor | float = 0.0
) -> Float[Tensor, "*n m"]:
    """exp(-sharpness (1 - affinity) + log_weight), in one pass over the affinity."""
    return torch.add(torch.as_tensor(log_weight - sharpness), affinity, alpha=sharpness).exp_()


@dataclass(eq=False)
class Cache(Predictor):
    """Tip-Adapter's cache: one-hot labels of the support, weighted by a kernel of cosines.

        cache_logits = exp(-sharpness (1 - x keys^T)) one_hot,    keys the support's unit rows, class by class

    If the task has augmented views, a key is the mean of its image's views, re-normalised (as the authors' ten).

    Source: Tip-Adapter (arXiv 2111.03930), eq. 3-5; repository gaopengcuhk/Tip-Adapter, `run_tip_adapter`.
    """

    features: str = "clip"
    sharpness: float = 1.0  # of the kernel, above 0; the authors' inner beta

    def fit(self, task: FewShotTask) -> Cache:
        self.check(task)
        order, self.counts_ = task.support.y.argsort(stable=True), task.counts  # keys stand class by class
        views = torch.stack([view.features(self.features)[order] for view in task.views or (task.support,)])
        self.keys_ = normalize(views.mean(0), dim=1) if len(views) > 1 else views[0]
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        rows = split.features(self.features).split(CHUNK)
        return torch.cat([self.cache_logits(self.affinity(x), self.sharpness) for x in rows])

    def logits_grid(self, split: Split, settings: Sequence[Mapping[str, object]]) -> Iterator[Float[Tensor, "n C"]]:
        """Logits under each setting; those that differ in `sharpness` alone are interpolated by `over_sharpness`."""
        affinity = self.affinity(split.features(self.features))
        copies, streams = [self.with_params(**setting) for setting in settings], {}
        for group in group_settings(copies, {"sharpness"}):
            sharpnesses = [float(copy.sharpness) for copy in group]
            stream = over_sharpness(partial(group[0].cache_logits, affinity), sharpnesses, affinity)
            streams |= dict.fromkeys(group, stream)
        return (next(streams[copy]) for copy in copies)

    def affinity(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n m"]:
        return x @ self.keys_.T

    def cache_logits(self, affinity: Float[Tensor, "n m"], sharpness: float) -> Float[Tensor, "n C"]:
        return class_sums(kernel(affinity, sharpness), self.counts_)


@dataclass(eq=False)
class TrainedCache(Cache):
    """Tip-Adapter-F: the keys of the cache are trained through the fused logits; labels and sharpness stay.

        loss = CE(s0 + init_beta exp(-init_sharpness (1 - x keys^T)) one_hot, y)

    Source: repository gaopengcuhk/Tip-Adapter, `run_tip_adapter_F`, whose epoch is the best on test, here the last.
    """

    needs_text: ClassVar[bool] = True
    init: str = "features"  # where the keys start: at the support's rows, or `random` (PyTorch's linear layer)
    init_beta: float = 1.17  # the fusion during training, as init_sharpness
    init_sharpness: float = 1.0
    lr: float = 1e-3  # of AdamW (eps 1e-4, weight decay 0.01) with a cosine per step
    epochs: int = 20
    batch_size: int = 256

    def fit(self, task: FewShotTask, orders: Int64[Tensor, "epochs n"] | None = None) -> TrainedCache:
        super().fit(task)
        if self.init not in ("features", "random"):
            raise ValueError(f"init of a cache is features or random, not {self.init!r}")
        self.keys_ = random_weight(task, self.keys_.shape) if self.init == "random" else self.keys_.clone()
        optimiser = torch.optim.AdamW([self.keys_.requires_grad_()], lr=self.lr, eps=1e-4)
        x, zero_shot, y = task.support.features(self.features), task.support.zero_shot, task.support.y

        def loss(rows: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
            cache_logits = self.cache_logits(self.affinity(x[rows]), self.init_sharpness)
            return cross_entropy(zero_shot[rows] + self.init_beta * cache_logits, y[rows])

        orders = row_orders(task, self.epochs) if orders is None else orders
        self.losses_ = training.minimise(loss, optimiser, orders, self.batch_size)
        self.keys_ = self.keys_.detach()
        return self


@dataclass(eq=False)
class SimilarCaches(Predictor):
    """CaFo's caches, one per encoder, each weighted by its agreement with zero-shot CLIP on the image at hand.

        bias = sum_k w_k norm(cache_k),    w = softmax_k(sum_c norm(cache_k)_c norm(s0)_c),    norm the z-score of a row

    `features` joins the encoders by `+`. The caches are not trained; the authors' 20 epochs are `TrainedCache`'s.

    Source: CaFo (arXiv 2303.02151), eq. 7-8; repository OpenGVLab/CaFo, `logits_fuse`.
    """

    needs_text: ClassVar[bool] = True
    features: str = "clip+aux"
    sharpness: float = 1.0

    def fit(self, task: FewShotTask) -> SimilarCaches:
        self.check(task)
        self.caches_ = [Cache(part).fit(task) for part in self.features.split("+")]
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        caches = [cache.with_params(sharpness=self.sharpness) for cache in self.caches_]
        return fusion.similarity(split.zero_shot, torch.stack([cache.logits(split) for cache in caches]))

    def logits_grid(self, split: Split, settings: Sequence[Mapping[str, object]]) -> Iterator[Float[Tensor, "n C"]]:
        settings = [{"sharpness": self.sharpness, **setting} for setting in settings]
        for cache_logits in zip(*(cache.logits_grid(split, settings) for cache in self.caches_), strict=True):
            yield fusion.similarity(split.zero_shot, torch.stack(cache_logits))


@dataclass(eq=False)
class APE(Cache):
    """APE: a cache on the channels that separate classes; support images that CLIP classifies badly weigh more.

        J_d  = inter (variance of t_cd over classes) - intra (mean product of x_id x_jd over i, j of two classes)
        bias = exp(-sharpness (1 - x' keys^T)) (one_hot exp(gamma KL)),    KL_i = -log2 p_iy,    p = softmax(keys T'^T)

    x', keys, T' hold the `channels` (a fraction) with the largest J, re-normalised. The mean product is over texts and
    support together and has a closed form: with S_c the sum of the N_c rows of class c, it is
    ((sum_c S_c)^2 - sum_c S_c^2) / ((sum_c N_c)^2 - sum_c N_c^2) in each channel. As released, p lacks the factor 100.

    Source: APE (arXiv 2304.01195), training-free; repository yangyangyang127/APE, `caltech101.yaml`.
    """

    clip_only: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True
    gamma: float = 0.1
    channels: float = 800 / 1024
    intra: float = 0.5
    inter: float = 0.5

    def fit(self, task: FewShotTask) -> APE:
        self.check(task)
        order, self.counts_ = task.support.y.argsort(stable=True), task.counts
        keep = max(1, math.floor(self.channels * task.text.shape[1] + 0.5))
        self.channels_ = self.criterion(task).topk(keep).indices
        self.keys_ = normalize(task.support.clip[order][:, self.channels_], dim=1)
        p = (self.keys_ @ normalize(task.text[:, self.channels_], dim=1).T).softmax(1)
        self.divergence_ = torch.log2((1 + 1e-6) / (p.gather(1, task.support.y[order, None])[:, 0] + 1e-6))
        return self

    def criterion(self, task: FewShotTask) -> Float[Tensor, " D"]:
        """J of each channel; the largest are kept."""
        sums = task.text.index_add(0, task.support.y, task.support.clip)
        counts = 1 + task.counts
        products = (sums.sum(0).square() - sums.square().sum(0)) / (counts.sum().square() - counts.square().sum())
        return self.inter * task.text.var(0) - self.intra * products

    def affinity(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n m"]:
        return normalize(x[:, self.channels_], dim=1) @ self.keys_.T

    def cache_logits(self, affinity: Float[Tensor, "n m"], sharpness: float) -> Float[Tensor, "n C"]:
        return class_sums(kernel(affinity, sharpness, self.gamma * self.divergence_), self.counts_)


@dataclass(eq=False)
class StaticMemory(Predictor):
    """DMN's static memory: for each image a prototype of each class, from the rows of the class that are like it.

        bias_c = 100 x unit(sum_i exp(-sharpness (1 - x m_ci)) m_ci)^T,    m_c the support's rows of c and its text

    Source: dual memory networks (arXiv 2403.17589), static half; repository YBZh/DMN at 598c270, `dmn_main.py`.
    """

    clip_only: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True
    features: str = "clip"
    sharpness: float = 5.5

    def fit(self, task: FewShotTask) -> StaticMemory:
        self.check(task)
        order, counts = task.support.y.argsort(stable=True), task.counts
        rows = task.support.clip[order].split(counts.tolist())
        self.memory_ = pad_sequence([torch.cat([t[None], x]) for t, x in zip(task.text, rows, strict=True)], True)
        return self  # shorter classes end in zeros, which weigh nothing

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        parts, products = [], self.memory_ @ self.memory_.mT
        for x in split.clip.split(CHUNK):
            affinity = x @ self.memory_.mT
            weight = kernel(affinity, self.sharpness)
            length = ((weight @ products) * weight).sum(-1).sqrt()  # of the prototypes, which are never written out
            parts.append(LOGIT_SCALE * ((weight * affinity).sum(-1) / length).T)
        return torch.cat(parts)


@dataclass(eq=False)
class ProKeR(GroupPredictor):
    """Proximal kernel ridge regression: the residual of zero-shot CLIP, regressed on the support in closed form.

        A = (K_SS / penalty + I)^-1 (one_hot - f_S T^T),  bias = 100 K(x, S) A,  K(a, b) = exp(-sharpness (1 - a b))

    The authors add K A to cosines; the factor 100 brings both to the scale of `s0`. Their A is `penalty` times the
    usual ridge coefficients, so a larger value means a stronger bias.

    Source: ProKeR (arXiv 2501.11175), eq. 11-12; repository ybendou/ProKeR at 035b684.
    """

    needs_text: ClassVar[bool] = True
    varying = ("penalty",)
    features: str = "clip"
    sharpness: float = 1.0  # above 0; the authors' beta
    penalty: float = 0.1  # above 0; the authors' lambda

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        rows = split.features(self.features).split(CHUNK)
        return torch.cat([kernel(x @ self.keys_.T, self.sharpness) @ self.coefficients_ for x in rows])

    @classmethod
    def fit_group(cls, task: FewShotTask, group: Sequence[ProKeR]) -> None:
        """A Cholesky factor for each penalty is quicker than one eigenbasis."""
        keys, zero_shot = task.support.features(group[0].features), task.support.zero_shot
        small = len(keys) <= 4 * CHUNK  # the kernel of 16,000 images takes 1 GB in float32, and is kept only once
        x = keys.double() if small else keys
        residual = one_hot(task.support.y, task.num_classes).to(x.dtype) - zero_shot / LOGIT_SCALE
        system = x.new_empty(len(x), len(x))
        write_kernel = lambda: torch.mm(x, x.T, out=system).sub_(1).mul_(group[0].sharpness).exp_()  # noqa: E731
        shared = write_kernel().clone() if small else None
        factor = system.mT  # by columns, as LAPACK wants it: any other order would be copied
        for predictor in group:
            (system.copy_(shared) if small else write_kernel()).div_(predictor.penalty)
            system.diagonal().add_(1)
            torch.linalg.cholesky(factor, out=factor)
            half = torch.linalg.solve_triangular(factor, residual, upper=False)
            coefficients = torch.linalg.solve_triangular(factor.mT, half, upper=True)
            predictor.keys_, predictor.coefficients_ = keys, LOGIT_SCALE * coefficients.float()


def over_sharpness(
    cache_logits: Callable[[float], Float[Tensor, "n C"]], sharpnesses: Sequence[float], affinity: Float[Tensor, "n m"]
) -> Iterator[Float[Tensor, "n C"]]:
    """`cache_logits(sharpness)` for each of many sharpnesses, of which only some 16 are computed.

    Cache logits are sums of exp(sharpness (affinity - 1)). The polynomial through r + 12 Chebyshev nodes of the range
    of sharpnesses meets them to float32's precision; r is half the range times the largest |affinity - 1|:

        p(s) = T(s) T(nodes)^-1 cache_logits(nodes),    T the row of Chebyshev polynomials of degree 0 to r + 11
    """
    middle, half = (min(sharpnesses) + max(sharpnesses)) / 2, (max(sharpnesses) - min(sharpnesses)) / 2
    count = math.ceil(half * max(abs(value.item() - 1) for value in affinity.aminmax())) + 12
    if len(set(sharpnesses)) <= count:
        yield from map(cache_logits, sharpnesses)
        return
    nodes = chebpts1(count)
    at_nodes = torch.stack([cache_logits(middle + half * node) for node in nodes.tolist()])
    places = (np.array(sharpnesses) - middle) / half
    weight = torch.from_numpy(chebvander(places, count - 1) @ np.linalg.inv(chebvander(nodes, count - 1))).float()
    for part in weight.split(max(1, 2**22 // at_nodes[0].numel())):
        yield from (part @ at_nodes.flatten(1)).view(-1, *at_nodes.shape[1:])
