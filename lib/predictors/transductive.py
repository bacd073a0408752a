"""Transductive predictors: a row's logits depend on the other images of its split, never on their labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from lib import metrics
from lib.predictors.base import Predictor
from lib.predictors.caches import CHUNK, class_sums, kernel
from lib.splits import LOGIT_SCALE, Split
from lib.tasks import FewShotTask


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
class Mixture(Predictor):
    """All images of a split classified together, as a mixture of Gaussians that CLIP's texts regularise.

        z_i  ~ p_i^lam exp((l_i + (25 / m) sum_j (w_ji + w_ij) z_j) / 50),    p = softmax(s0)
        l_ic = -sum_d (x_id - mu_cd)^2 / (2 v_d)

    z are the class probabilities, w_ij the cosine of row i to its m nearest images of the split (labelled images are
    rows too, with z at their labels). Eleven rounds of five updates of z, then of the means mu and the variances v,
    `statistics`. Logits: log z + constant. As released, the nearest image of every row is taken for itself and left
    out, which costs labelled images one true neighbour.
    """

    needs_text: ClassVar[bool] = True
    per_batch: ClassVar[bool] = True
    features: str = "clip"  # the space of the Gaussians and the neighbours; the prior is always CLIP's `s0`
    lam: float | None = None  # power of the prior; None is the authors' 0.5, and 1 without labelled images
    neighbours: int = 3

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        x, prior = split.features(self.features), split.zero_shot.log_softmax(1)
        z = prior.exp()
        mean, variance = first = self.start(x, z)
        prior *= self.lam if self.lam is not None else 0.5 if len(self.support_) else 1.0
        graph, from_support = self._graph(x)
        for round_ in range(11):
            scaled = mean / variance
            likelihood = torch.addmm((mean * scaled).sum(1), x, scaled.T, beta=-0.5)
            if variance.ndim > 1:  # else all classes share this term
                likelihood -= x.square() @ (0.5 / variance).T
            for _ in range(5):
                log_z = torch.sparse.mm(graph, z).add_(from_support).mul_(25 / self.neighbours)
                log_z.add_(likelihood).div_(50).add_(prior)
                z = log_z.softmax(1)
            if round_ < 10:
                mean, variance = self.statistics(x, z, *first)
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


@dataclass(eq=False)
class TransCLIP(Mixture):
    """TransCLIP: a mixture with one shared variance, to which support images belong.

        mu_c = unit(S_c),    v = sum_c (sum_i z_ic (x_i - mu_c)^2) / sum_ic z_ic,    S_c = sum_i z_ic x_i

    Each of N support images counts 50 gamma / N, each of n images 1 / n. Rows stand in one order, images of the split
    first. The released code mixes two orders in the few-shot case, which pairs neighbours with the wrong z; the formula
    is followed (`fs_rows_reordered` of the reference).

    Source: TransCLIP (arXiv 2406.01837), eq. 5-8; repository MaxZanella/transduction-for-vlms.
    """

    gamma: float = 0.02  # weight of the support; the authors choose among 0.002, 0.01, 0.02 and 0.2
    use_support: bool = True  # False: the zero-shot variant; means start at each class's 8 most confident images

    def fit(self, task: FewShotTask) -> TransCLIP:
        self.check(task)
        rows = slice(None) if self.use_support else slice(0)
        self.support_ = task.support.features(self.features)[rows]
        self.one_hot_ = one_hot(task.support.y, task.num_classes).float()[rows]
        return self

    def start(self, x: Float[Tensor, "n D"], z: Float[Tensor, "n C"]) -> tuple[Tensor, Tensor]:
        variance = torch.full((x.shape[1],), 1 / x.shape[1])
        if self.use_support:
            return normalize(self.one_hot_.T @ self.support_, dim=1), variance
        top = z.topk(min(8, len(z)), dim=0)
        return normalize((top.values[:, :, None] * x[top.indices]).sum(0), dim=1), variance

    def statistics(self, x: Float[Tensor, "n D"], z: Float[Tensor, "n C"], *_: Tensor) -> tuple[Tensor, Tensor]:
        n, weight = len(x), 50 * self.gamma / max(1, len(self.support_))
        squares = x.norm(dim=0).square() / n + weight * self.support_.norm(dim=0).square()
        sums = z.T @ x / n + weight * self.one_hot_.T @ self.support_
        counts = z.sum(0) / n + weight * self.one_hot_.sum(0)
        mean = normalize(sums, dim=1)
        variance = (squares - 2 * (mean * sums).sum(0) + counts @ mean.square()) / counts.sum()
        return mean, variance.clamp_min(1e-12)  # a channel that never varies separates no classes


@dataclass(eq=False)
class StatA(Mixture):
    """StatA: a mixture whose statistics are anchored at the texts, for batches in which few classes are present.

        mu_c = unit(b_c unit(S_c) + (1 - b_c) t_c),    v_c = b_c V_c + (1 - b_c) (v_0 + (t_c - mu_c)^2)

    b_c = n_c / (alpha + n_c), n_c the images of which c is the likeliest class; S_c is the sum of the images and V_c
    their mean square distance to mu_c, weighted by z; v_0 is that to the texts, over all classes at the start. No label
    enters. (The released code divides v_0 once per 2,500 images instead of once.)

    Source: StatA (arXiv 2501.03729); repository MaxZanella/StatA at 0138fd9, the formula alone.
    """

    clip_only: ClassVar[bool] = True
    alpha: float = 1.0  # above 0, in images

    def fit(self, task: FewShotTask) -> StatA:
        self.check(task)
        self.text_, self.support_ = task.text, task.support.clip[:0]
        self.one_hot_ = task.text.new_zeros(0, task.num_classes)
        return self

    def start(self, x: Float[Tensor, "n D"], z: Float[Tensor, "n C"]) -> tuple[Tensor, Tensor]:
        variance = (z.sum(0)[:, None] * _spread(x, z, self.text_)).sum(0) / len(x)
        return self.text_, variance.expand_as(self.text_)

    def statistics(
        self, x: Float[Tensor, "n D"], z: Float[Tensor, "n C"], text: Float[Tensor, "C D"], start: Float[Tensor, "C D"]
    ) -> tuple[Tensor, Tensor]:
        images = torch.bincount(z.argmax(1), minlength=z.shape[1])[:, None].float()
        share = images / (self.alpha + images)
        mean = normalize(share * normalize(z.T @ x, dim=1) + (1 - share) * text, dim=1)
        anchor = start + (text - mean).square()
        return mean, (share * _spread(x, z, mean) + (1 - share) * anchor).clamp_min(1e-12)


def _spread(x: Float[Tensor, "n D"], z: Float[Tensor, "n C"], mean: Float[Tensor, "C D"]) -> Float[Tensor, "C D"]:
    """sum_i z_ic (x_i - mean_c)^2 / sum_i z_ic in each channel."""
    weight = z / z.sum(0).clamp_min(1e-12)
    return weight.T @ x.square() - 2 * mean * (weight.T @ x) + weight.sum(0)[:, None] * mean.square()


@dataclass(eq=False)
class ClassPrior(Predictor):
    """Frolic's prior: how often CLIP predicts each class of a split beyond its right; no label enters.

        bias = -log pi,    pi = P pi,    P_jk the mean of softmax_j(s0) over the images predicted as k

    Found from 1 / C by applying P, `steps` times. A class that no image is predicted as has an empty column, ends near
    0 and gains much: made for splits that hold all classes. The released script adds this to an ensemble.

    Source: Frolic (arXiv 2410.19294); repository zhuhsingyuu/Frolic at d276403, `main_zeroshot.py`.
    """

    needs_text: ClassVar[bool] = True
    per_batch: ClassVar[bool] = True
    features: str = "clip"  # none are read
    steps: int = 100  # as released; pi moves on slowly

    def fit(self, task: FewShotTask) -> ClassPrior:
        self.check(task)
        task.support.features(self.features)  # refuses an unknown kind
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        p, classes = split.zero_shot.softmax(1), split.zero_shot.shape[1]
        matrix, pi = metrics.class_means(p, p.argmax(1), classes).nan_to_num(0.0).T, p.new_full((classes,), 1 / classes)
        for _ in range(self.steps):
            pi = normalize(matrix @ pi, p=1, dim=0)
        return -pi.clamp_min(1e-12).log().expand_as(p)


@dataclass(eq=False)
class ZLaP(Predictor):
    """ZLaP: labels spread from the class texts, and from support images, to a split along nearest neighbours.

        Z = (I - alpha W)^-1 Y,    W = D^-1/2 (A + A^T) D^-1/2,    Y one-hot at texts and support images

    A has the cosines of each image to its k nearest images, of which it is itself one and left out afterwards, and to
    its k nearest texts, to the power gamma; negative ones count 0. The inverse is the sum of all (alpha W)^m, cut where
    the rest is below 1e-7. The logits are rows of Z, small and positive.

    Source: ZLaP (arXiv 2404.04072); repository vladan-stojnic/ZLaP at 6f5688f.
    """

    clip_only: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True
    per_batch: ClassVar[bool] = True
    features: str = "clip"
    k: int = 5
    gamma: float = 5.0
    alpha: float = 0.3  # in (0, 1)
    use_support: bool = False  # beside its images the texts, whose edges are made weak by gamma, hardly count

    def fit(self, task: FewShotTask) -> ZLaP:
        self.check(task)
        rows = slice(None) if self.use_support else slice(0)
        self.text_, self.support_, self.y_ = task.text, task.support.clip[rows], task.support.y[rows]
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        images, classes = torch.cat([self.support_, split.clip]), len(self.text_)
        start = torch.zeros(classes + len(images), classes)
        start[: classes + len(self.y_)] = one_hot(torch.cat([torch.arange(classes), self.y_]), classes).float()
        graph, z = self.graph(images), start
        for _ in range(math.ceil(math.log(1e-7 * (1 - self.alpha)) / math.log(self.alpha))):
            z = start + self.alpha * torch.sparse.mm(graph, z)
        return z[-len(split) :]

    def graph(self, images: Float[Tensor, "m D"]) -> Tensor:
        """W, sparse [C + m, C + m], texts first."""
        classes, n, columns, weights = len(self.text_), len(self.text_) + len(images), [], []
        for others, first, power in ((self.text_, 0, self.gamma), (images, classes, 1.0)):
            nearest = [(part @ others.T).topk(min(self.k, len(others))) for part in images.split(1024)]
            weights.append(torch.cat([part.values for part in nearest]).clamp_min(0) ** power)
            columns.append(torch.cat([part.indices for part in nearest]) + first)
        j, weight = torch.cat(columns, dim=1), torch.cat(weights, dim=1)
        i = torch.arange(classes, n)[:, None].expand_as(j)
        i, j, weight = i[i != j], j[i != j], weight[i != j]
        rows, columns = torch.cat([i, j]), torch.cat([j, i])
        degree = torch.zeros(n).index_add(0, rows, weight.repeat(2)).clamp_min(1e-12)
        weight = weight.repeat(2) / (degree[rows] * degree[columns]).sqrt()
        return torch.sparse_coo_tensor(torch.stack([rows, columns]), weight, (n, n), check_invariants=True).coalesce()
