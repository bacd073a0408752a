"""Transductive predictors: a row's logits depend on the other images of its split, never on their labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from lib.predictors.base import Predictor
from lib.predictors.caches import CHUNK, class_sums, kernel
from lib.tasks import LOGIT_SCALE, FewShotTask, Split


@dataclass(eq=False)
class MAdapter(Predictor):
    """M-Adapter (CapS-Adapter): a cache on images and captions, less the divergence of zero-shot predictions.

        affinity = (1 - delta) x keys^T + delta f captions^T,    p = softmax(f T^T / temperature)
        bias = exp(-sharpness (1 - affinity)) one_hot - gamma rescale(KL(p || P)) one_hot,    P the support's p

    `captions` are features of one caption per support image. `rescale` maps the divergences of a whole split onto the
    range of its affinities, so a row's logits depend on the rows around it.

    A task carries no captions, so the text of an image's own class stands in for its caption. The released code takes
    p over the feature's channels, not over classes, and drops rows of the last block of ten; the paper's formula is
    followed (`corrected_dist_rows` of the reference). With delta = 0 this is SuS-X's Tip-X.

    Source: CapS-Adapter (arXiv 2405.16591); repository WLuLi/CapS-Adapter, `madapter.py`.
    """

    needs_text: ClassVar[bool] = True
    per_batch: ClassVar[bool] = True
    features: str = "clip"  # of the images' keys; captions need CLIP's own space and always use it
    sharpness: float = 5.5
    gamma: float = 0.5  # weighs the divergences against the cache
    delta: float = 0.3  # weighs the captions, in [0, 1]
    temperature: float = 0.5

    def fit(self, task: FewShotTask, captions: Float[Tensor, "m D"] | None = None) -> MAdapter:
        self.check(task)
        order, self.counts_ = task.support.y.argsort(stable=True), task.counts
        self.keys_ = task.support.features(self.features)[order]
        self.captions_ = (task.text[task.support.y] if captions is None else captions)[order]
        self.log_predictions_ = self._log_predictions(task.support)[order]
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return next(self.logits_grid(split, [{}]))

    def logits_grid(self, split: Split, settings: Sequence[Mapping[str, object]]) -> Iterator[Float[Tensor, "n C"]]:
        """Logits under each setting from one pass over the split; `rescale` is linear, and so are sums over classes."""
        copies = [self.with_params(**setting) for setting in settings]
        divergences, caches = [], {(copy.sharpness, copy.delta): [] for copy in copies}
        for rows in torch.arange(len(split)).split(CHUNK):
            images, captions, kl = self._comparisons(split.rows(rows))
            divergences.append((class_sums(kl, self.counts_), *kl.aminmax()))
            for (sharpness, delta), parts in caches.items():
                affinity = torch.lerp(images, captions, delta)
                parts.append((class_sums(kernel(affinity, sharpness), self.counts_), *affinity.aminmax()))
        kl_sums, kl_low, kl_high = _join(divergences)
        joined = {key: _join(parts) for key, parts in caches.items()}
        for copy in copies:
            cache_logits, low, high = joined[copy.sharpness, copy.delta]
            ratio = (high - low) / (kl_high - kl_low).clamp_min(1e-12)
            yield cache_logits - copy.gamma * (self.counts_ * (low - ratio * kl_low) + ratio * kl_sums)

    def _comparisons(self, split: Split) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"], Float[Tensor, "n m"]]:
        """Affinity of each row to the support's images and captions, divergence from its predictions."""
        log_p = self._log_predictions(split)
        p = log_p.exp()
        kl = (p * log_p).sum(1, keepdim=True) - p @ self.log_predictions_.T
        return split.features(self.features) @ self.keys_.T, split.clip @ self.captions_.T, kl

    def _log_predictions(self, split: Split) -> Float[Tensor, "n C"]:
        return (split.zero_shot / (LOGIT_SCALE * self.temperature)).log_softmax(1)


def _join(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, smallest and largest value of all chunks."""
    rows, low, high = zip(*parts, strict=True)
    return torch.cat(rows), torch.stack(low).min(), torch.stack(high).max()


@dataclass(eq=False)
class TransCLIP(Predictor):
    """TransCLIP: all images of a split are classified together, as a mixture of Gaussians that CLIP's texts regularise.

        z_i  ~ p_i^lam exp((l_i + (25 / m) sum_j (w_ji + w_ij) z_j) / 50),    p = softmax(s0)
        l_ic = -sum_d (x_id - mu_cd)^2 / (2 v_d)

    z are the class probabilities, w_ij the cosine of row i to its m nearest images of the split (support images are
    rows too, with z at their labels). Eleven rounds of five updates of z, then of the means mu (unit length) and the
    shared variance v from all images, the support's weighing 50 gamma / N each against 1 / n. Logits: log z + constant.

    Rows stand in one order, images of the split first. The released code mixes two orders in the few-shot case, which
    pairs neighbours with the wrong z; the formula is followed (`fs_rows_reordered` of the reference). As there, the
    nearest image of every row is taken for itself and left out, which costs support images one true neighbour.

    Source: TransCLIP (arXiv 2406.01837), eq. 5-8; repository MaxZanella/transduction-for-vlms.
    """

    needs_text: ClassVar[bool] = True
    per_batch: ClassVar[bool] = True
    features: str = "clip"  # the space of the Gaussians and the neighbours; the prior is always CLIP's `s0`
    gamma: float = 0.02  # weight of the support; the authors choose among 0.002, 0.01, 0.02 and 0.2
    lam: float | None = None  # power of the prior; None is the authors' 0.5, and 1 without the support
    neighbours: int = 3
    use_support: bool = True  # False: the zero-shot variant; means start at each class's 8 most confident images

    def fit(self, task: FewShotTask) -> TransCLIP:
        self.check(task)
        rows = slice(None) if self.use_support else slice(0)
        self.support_ = task.support.features(self.features)[rows]
        self.one_hot_ = one_hot(task.support.y, task.num_classes).float()[rows]
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        x, n = split.features(self.features), len(split)
        prior = split.zero_shot.log_softmax(1)
        z = prior.exp()
        mean, variance = self._initial_means(x, z), torch.full((x.shape[1],), 1 / x.shape[1])
        prior *= self.lam if self.lam is not None else 0.5 if self.use_support else 1.0
        graph, from_support = self._graph(x)
        weight = 50 * self.gamma / max(1, len(self.support_))
        support_sums, support_counts = weight * self.one_hot_.T @ self.support_, weight * self.one_hot_.sum(0)
        squares = x.norm(dim=0).square() / n + weight * self.support_.norm(dim=0).square()
        for round_ in range(11):
            scaled = mean / variance
            likelihood = torch.addmm((mean * scaled).sum(1), x, scaled.T, beta=-0.5)
            for _ in range(5):
                log_z = torch.sparse.mm(graph, z).add_(from_support).mul_(25 / self.neighbours)
                log_z.add_(likelihood).div_(50).add_(prior)
                z = log_z.softmax(1)
            if round_ < 10:
                sums, counts = z.T @ x / n + support_sums, z.sum(0) / n + support_counts
                mean = normalize(sums, dim=1)
                variance = (squares - 2 * (mean * sums).sum(0) + counts @ mean.square()) / counts.sum()
                variance = variance.clamp_min(1e-12)  # a channel that never varies separates no classes
        return log_z

    def _graph(self, x: Float[Tensor, "n D"]) -> tuple[Tensor, Float[Tensor, "n C"]]:
        """w_ij + w_ji between images of the split, sparse, and the sum over the support of w_ji z_j of each image."""
        n, rows = len(x), torch.cat([x, self.support_])
        nearest = [(part @ x.T).topk(min(self.neighbours + 1, n)) for part in rows.split(1024)]
        # without the very nearest
        cosine, index = (torch.cat(parts)[:, 1:] for parts in zip(*nearest, strict=True))
        i, j = torch.arange(n).repeat_interleave(index.shape[1]), index[:n].flatten()
        edges, weights = torch.stack([torch.cat([i, j]), torch.cat([j, i])]), cosine[:n].flatten().repeat(2)
        graph = torch.sparse_coo_tensor(edges, weights, (n, n), check_invariants=True).coalesce()
        from_support = torch.zeros(n, self.one_hot_.shape[1])
        for k in range(index.shape[1]):
            from_support.index_add_(0, index[n:, k], cosine[n:, k, None] * self.one_hot_)
        return graph, from_support

    def _initial_means(self, x: Float[Tensor, "n D"], z: Float[Tensor, "n C"]) -> Float[Tensor, "C D"]:
        if self.use_support:
            return normalize(self.one_hot_.T @ self.support_, dim=1)
        top = z.topk(min(8, len(z)), dim=0)
        return normalize((top.values[:, :, None] * x[top.indices]).sum(0), dim=1)
