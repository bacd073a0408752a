"""Predictors that keep the support and let its images vote: caches and kernel regression.

An image is compared with every support image; what differs is how similarity is measured, how it turns into a vote
and how votes are weighed. All comparisons of a grid search share one similarity matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from lib import fusion, metrics
from lib.predictors import training
from lib.predictors.base import JointPredictor, Predictor, random_weight
from lib.tasks import LOGIT_SCALE, FewShotTask, Split

CHUNK = 2048  # images compared with the whole support at a time, so that memory stays bounded


class Cache(Predictor):
    """Tip-Adapter's cache: an image votes for the classes of the support images it resembles.

        bias = exp(-sharpness (1 - x X^T)) Y,    X the support's unit rows, Y their labels, one-hot

    If the task has augmented views, a key is the mean of its image's views, re-normalised (as the authors' ten).

    Args:
        features: `clip`, `aux` or `clip+aux`.
        sharpness: how fast a vote fades with distance, above 0; the authors' inner beta.

    Source: Tip-Adapter (arXiv 2111.03930), eq. 3-5; repository gaopengcuhk/Tip-Adapter, `run_tip_adapter`.
    """

    def __init__(self, features: str = "clip", sharpness: float = 1.0) -> None:
        self.features = features
        self.sharpness = sharpness

    def fit(self, task: FewShotTask) -> Cache:
        shown = torch.stack([view.features(self.features) for view in task.views or (task.support,)])
        self.keys_ = normalize(shown.mean(0), dim=1) if len(shown) > 1 else shown[0]
        self.labels_, self.num_classes_ = task.support.y, task.num_classes
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        rows = split.features(self.features).split(CHUNK)
        return torch.cat([self._votes(self._closeness(part), self.sharpness) for part in rows])

    def logits_grid(self, split: Split, settings: Sequence[Mapping[str, object]]) -> Iterator[Float[Tensor, "n C"]]:
        """Yield the votes under each `sharpness`; see `over_sharpness` for what makes 200 of them cheap."""
        closeness = self._closeness(split.features(self.features))
        sharpnesses = [float(setting.get("sharpness", self.sharpness)) for setting in settings]
        yield from over_sharpness(lambda sharpness: self._votes(closeness, sharpness), sharpnesses, closeness)

    def _closeness(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n m"]:
        """Return `x X^T - 1`, the support class by class."""
        return x @ self.keys_[torch.argsort(self.labels_, stable=True)].T - 1

    def _votes(self, closeness: Float[Tensor, "n m"], sharpness: float) -> Float[Tensor, "n C"]:
        return torch.exp(sharpness * closeness).view(len(closeness), self.num_classes_, -1).sum(-1)


class TrainedCache(Cache):
    """Tip-Adapter-F: the keys of the cache are trained through the fused logits; labels and sharpness stay.

        loss = CE(s0 + init_beta exp(-init_sharpness (1 - x keys^T)) Y, y)

    Args:
        features, sharpness: as in `Cache`.
        init: where the keys start: `features` (the support's rows) or `random` (PyTorch's linear layer).
        init_beta, init_sharpness: the fusion during training.
        lr, epochs, batch_size: of AdamW (eps 1e-4, weight decay 0.01) with a cosine per step.

    The authors keep the epoch that is best on the test images; here it is the last.

    Source: repository gaopengcuhk/Tip-Adapter, `run_tip_adapter_F`.
    """

    def __init__(
        self,
        features: str = "clip",
        sharpness: float = 1.0,
        init: str = "features",
        init_beta: float = 1.17,
        init_sharpness: float = 1.0,
        lr: float = 1e-3,
        epochs: int = 20,
        batch_size: int = 256,
    ) -> None:
        super().__init__(features, sharpness)
        self.init, self.init_beta, self.init_sharpness = init, init_beta, init_sharpness
        self.lr, self.epochs, self.batch_size = lr, epochs, batch_size

    def fit(self, task: FewShotTask) -> TrainedCache:
        super().fit(task)
        if self.init not in ("features", "random"):
            raise ValueError(f"init of a cache is features or random, not {self.init!r}")
        keys = random_weight(task, self.keys_.shape) if self.init == "random" else self.keys_.clone()
        self.keys_ = keys.requires_grad_()
        x, zero_shot, y = task.support.features(self.features), task.support.zero_shot, task.support.y
        orders = self._orders(task, self.epochs)

        def loss(rows: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
            votes = self._votes(self._closeness(x[rows]), self.init_sharpness)
            return cross_entropy(zero_shot[rows] + self.init_beta * votes, y[rows])

        optimiser = torch.optim.AdamW([keys], lr=self.lr, eps=1e-4)
        rates = training.cosine(self.lr, self.epochs * math.ceil(len(y) / self.batch_size))
        self.losses_ = training.minimise(loss, optimiser, orders, self.batch_size, rates)
        self.keys_ = keys.detach()
        return self


class SimilarCaches(Predictor):
    """CaFo's caches, one per encoder, each weighed by how well it agrees with zero-shot CLIP on the image at hand.

        bias = sum_k w_k norm(cache_k),    w = softmax_k(sum_c norm(cache_k)_c norm(s0)_c),    norm the z-score of a row

    The caches are used as they are; the authors' 20 epochs of training are `TrainedCache`'s.

    Args:
        features: the encoders, joined by `+`.
        sharpness: of every cache.
        norm: `mean` (z-score, the authors' default), `softmax` or `linear` (unit length), see `fusion.similarity`.

    Source: CaFo (arXiv 2303.02151), eq. 7-8; repository OpenGVLab/CaFo, `logits_fuse`.
    """

    def __init__(self, features: str = "clip+aux", sharpness: float = 1.0, norm: str = "mean") -> None:
        self.features, self.sharpness, self.norm = features, sharpness, norm

    def fit(self, task: FewShotTask) -> SimilarCaches:
        self.caches_ = [Cache(part, self.sharpness).fit(task) for part in self.features.split("+")]
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        for cache in self.caches_:
            cache.sharpness = self.sharpness
        return self._weigh(split, [cache.logits(split) for cache in self.caches_])

    def logits_grid(self, split: Split, settings: Sequence[Mapping[str, object]]) -> Iterator[Float[Tensor, "n C"]]:
        """Yield the fused votes under each `sharpness`."""
        for votes in zip(*(cache.logits_grid(split, settings) for cache in self.caches_), strict=True):
            yield self._weigh(split, votes)

    def _weigh(self, split: Split, votes: Sequence[Float[Tensor, "n C"]]) -> Float[Tensor, "n C"]:
        return fusion.similarity(split.zero_shot, torch.stack(list(votes)), self.norm)


class APE(Predictor):
    """APE: a cache on the channels that tell classes apart, its votes weighed by what zero-shot CLIP gets wrong.

        J_d  = w_inter (variance of t_cd over classes) - w_intra (mean product of x_id x_jd over i, j of two classes)
        bias = exp(-sharpness (1 - x' X'^T)) (Y exp(gamma KL)),    KL_i = log2(1 / p_iy),    p_i = softmax(x'_i T'^T)

    x', X', T' hold the `channels` with the largest J, re-normalised. The mean product runs over the texts and the
    support together and has a closed form: with S_c the sum of class c's rows, it is
    ((sum_c S_c)^2 - sum_c S_c^2) / (C (C - 1) (K + 1)^2) in each channel. Support images that CLIP gets wrong count
    more, and p is taken without CLIP's factor 100, as released.

    Args:
        features: `clip`.
        sharpness: as in `Cache`.
        gamma: strength of the weights exp(gamma KL); 0 switches them off.
        channels: share of the channels kept, in (0, 1].
        intra, inter: the two weights of J.

    Source: APE (arXiv 2304.01195), training-free; repository yangyangyang127/APE, `caltech101.yaml`.
    """

    def __init__(
        self,
        features: str = "clip",
        sharpness: float = 1.0,
        gamma: float = 0.1,
        channels: float = 800 / 1024,
        intra: float = 0.5,
        inter: float = 0.5,
    ) -> None:
        self.features, self.sharpness, self.gamma = features, sharpness, gamma
        self.channels, self.intra, self.inter = channels, intra, inter

    def fit(self, task: FewShotTask) -> APE:
        self._refuse_other_features()
        x, y, text, classes = task.support.clip, task.support.y, task.text, task.num_classes
        keep = max(1, math.floor(self.channels * text.shape[1] + 0.5))
        self.channels_ = self.criterion(task).topk(keep).indices
        by_class = torch.argsort(y, stable=True)
        self.keys_ = normalize(x[by_class][:, self.channels_], dim=1)
        known = (self.keys_ @ normalize(text[:, self.channels_], dim=1).T).softmax(1)
        right = known.gather(1, y[by_class, None])[:, 0]
        self.divergence_ = torch.log2((1 + 1e-6) / (right + 1e-6)).view(classes, -1)
        return self

    def criterion(self, task: FewShotTask) -> Float[Tensor, " D"]:
        """Return J, one number per channel; larger is kept."""
        sums = task.text + metrics.class_means(task.support.clip, task.support.y, task.num_classes) * task.shots
        pairs = task.num_classes * (task.num_classes - 1) * (task.shots + 1) ** 2
        similarity = (sums.sum(0).square() - sums.square().sum(0)) / pairs
        return self.inter * task.text.var(0) - self.intra * similarity

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        rows = split.clip.split(CHUNK)
        return torch.cat([self._votes(self._closeness(part), self.sharpness, self.gamma) for part in rows])

    def logits_grid(self, split: Split, settings: Sequence[Mapping[str, object]]) -> Iterator[Float[Tensor, "n C"]]:
        """Yield the votes under each `sharpness` and `gamma`; quick where neighbours in the list share a gamma."""
        closeness = self._closeness(split.clip)
        pairs = [(float(s.get("sharpness", self.sharpness)), float(s.get("gamma", self.gamma))) for s in settings]
        for gamma, run in groupby(pairs, key=lambda pair: pair[1]):
            votes = partial(self._votes, closeness, gamma=gamma)
            yield from over_sharpness(votes, [sharpness for sharpness, _ in run], closeness)

    def _closeness(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n m"]:
        return normalize(x[:, self.channels_], dim=1) @ self.keys_.T - 1

    def _votes(self, closeness: Float[Tensor, "n m"], sharpness: float, gamma: float) -> Float[Tensor, "n C"]:
        votes = torch.exp(sharpness * closeness).view(len(closeness), *self.divergence_.shape)
        return torch.einsum("nck,ck->nc", votes, torch.exp(gamma * self.divergence_))


class ProKeR(JointPredictor):
    """Proximal kernel ridge regression: the residual of zero-shot CLIP, regressed on the support in closed form.

        A = (K_SS / penalty + I)^-1 (Y - f_S T^T),    bias = 100 K(x, S) A,    K(a, b) = exp(-sharpness (1 - a b))

    The authors add K A to cosines; the factor 100 brings both to the scale of `s0`. Their A is `penalty` times the
    usual ridge coefficients, so a larger value means a stronger bias. Settings with one kernel share its matrix; a
    Cholesky factor for each of ten penalties is several times quicker than one eigendecomposition for all.

    Args:
        features: what the kernel compares: `clip`, `aux` or `clip+aux`.
        sharpness: of the kernel, above 0; the authors' beta.
        penalty: above 0; the authors' lambda.

    Source: ProKeR (arXiv 2501.11175), eq. 11-12; repository ybendou/ProKeR at 035b684.
    """

    varying = frozenset(("penalty",))

    def __init__(self, features: str = "clip", sharpness: float = 1.0, penalty: float = 0.1) -> None:
        self.features, self.sharpness, self.penalty = features, sharpness, penalty

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        rows = split.features(self.features).split(CHUNK)
        return torch.cat([torch.exp(self.sharpness * (part @ self.keys_.T - 1)) @ self.coefficients_ for part in rows])

    def _kernel(self, x: Float[Tensor, "n D"], out: Float[Tensor, "n n"] | None = None) -> Float[Tensor, "n n"]:
        return torch.mm(x, x.T, out=out).sub_(1).mul_(self.sharpness).exp_()

    @classmethod
    def _fit_together(cls, task: FewShotTask, members: Sequence[ProKeR]) -> None:
        first, support = members[0], task.support
        x = support.features(first.features)
        small = len(x) <= 4 * CHUNK  # the kernel of 16,000 images takes 1 GB in float32, and is held once, not thrice
        x_precise = x.double() if small else x
        residual = one_hot(support.y, task.num_classes).to(x_precise.dtype)
        residual -= support.zero_shot / LOGIT_SCALE
        kept = first._kernel(x_precise) if small else None
        system = x_precise.new_empty(len(x), len(x))
        factor = system.mT  # by columns, as LAPACK wants it: any other order would be copied
        for member in members:
            (system.copy_(kept) if small else first._kernel(x_precise, out=system)).div_(member.penalty)
            system.diagonal().add_(1)
            torch.linalg.cholesky(factor, out=factor)
            half = torch.linalg.solve_triangular(factor, residual, upper=False)
            coefficients = torch.linalg.solve_triangular(factor.mT, half, upper=True)
            member.keys_, member.coefficients_ = x, LOGIT_SCALE * coefficients.float()


def over_sharpness(
    votes: Callable[[float], Float[Tensor, "*b"]], sharpnesses: Sequence[float], closeness: Float[Tensor, "n m"]
) -> Iterator[Float[Tensor, "*b"]]:
    """Yield `votes(sharpness)` for each of many sharpnesses, computing only a few of them.

    Votes are sums of exp(sharpness * closeness), which a polynomial through r + 12 Chebyshev nodes of the range of
    sharpnesses meets to the precision of float32; r is half the range times the largest distance. Some 16 votes thus
    stand for 200:

        p(s) = sum_j v_j w_j / (s - s_j) / sum_j w_j / (s - s_j),    w_j = (-1)^j sin((2j + 1) pi / 2J),  j < J nodes
    """
    low, high = min(sharpnesses), max(sharpnesses)
    count = math.ceil((high - low) / 2 * closeness.abs().max().item()) + 12
    if len(set(sharpnesses)) <= count:
        yield from map(votes, sharpnesses)
        return
    angle = (2 * torch.arange(count, dtype=torch.float64) + 1) * math.pi / (2 * count)
    nodes = (low + high) / 2 + (high - low) / 2 * torch.cos(angle)
    sign = 1 - 2 * (torch.arange(count, dtype=torch.float64) % 2)
    known = None
    for j, node in enumerate(nodes.tolist()):
        at = votes(node)
        known = at.new_empty(count, *at.shape) if known is None else known
        known[j] = at
    gap = torch.tensor(sharpnesses, dtype=torch.float64)[:, None] - nodes
    share = sign * torch.sin(angle) / torch.where(gap.abs() < 1e-12, 1e-12, gap)
    share = (share / share.sum(1, keepdim=True)).float()
    for part in share.split(max(1, 2**22 // known[0].numel())):
        yield from (part @ known.flatten(1)).view(-1, *known.shape[1:])
