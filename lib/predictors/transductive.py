"""Predictors that look at a whole split at once: a row's logits depend on the rows around it, never on their labels.

Peers of this kind answer another question than the rest: what if all test images are there when the first is
classified? Their figures are marked for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from lib.predictors.caches import CHUNK
from lib.predictors.base import Predictor
from lib.tasks import LOGIT_SCALE, FewShotTask, Split

GRID = 2**26  # comparisons of a split with the support that a grid search may hold, three numbers each


class MAdapter(Predictor):
    """M-Adapter (CapS-Adapter): a cache on images and captions, and a vote by how alike zero-shot predictions are.

        k    = (1 - delta) x X^T + delta f S^T
        bias = exp(-sharpness (1 - k)) Y - gamma rescale(KL(p || P)) Y,    p = softmax(cos(f, T) / temperature)

    S are features of captions, one per support image; P are the support's zero-shot predictions. `rescale` maps the
    divergences of a whole split onto the range of its k, so a row's logits depend on the rows around it.

    A task carries no captions, so the text of an image's own class stands in for its caption. The released code takes
    p over the feature's channels, not over classes, and drops rows of the last block of ten; the paper's formula is
    followed (`corrected_dist_rows` of the reference). With delta = 0 this is SuS-X's Tip-X.

    Args:
        features: of the images' part X; the captions need CLIP's own space and always use it.
        sharpness: as in `Cache`.
        gamma: weight of the prediction votes, relative to the cache's.
        delta: share of the captions in k, in [0, 1].
        temperature: of p, on cosines.

    Source: CapS-Adapter (arXiv 2405.16591); repository WLuLi/CapS-Adapter, `madapter.py`.
    """

    def __init__(
        self,
        features: str = "clip",
        sharpness: float = 5.5,
        gamma: float = 0.5,
        delta: float = 0.3,
        temperature: float = 0.5,
    ) -> None:
        self.features, self.sharpness, self.gamma = features, sharpness, gamma
        self.delta, self.temperature = delta, temperature

    def fit(self, task: FewShotTask) -> MAdapter:
        by_class = torch.argsort(task.support.y, stable=True)
        self.keys_ = task.support.features(self.features)[by_class]
        self.captions_ = self._captions(task)[by_class]
        self.log_predictions_ = self._log_predictions(task.support)[by_class]
        self.num_classes_ = task.num_classes
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        ranges = torch.stack([torch.stack([*k.aminmax(), *kl.aminmax()]) for k, kl in self._compare_all(split)])
        low, high, kl_low, kl_high = ranges[:, 0].min(), ranges[:, 1].max(), ranges[:, 2].min(), ranges[:, 3].max()
        found = []
        for k, kl in self._compare_all(split):  # once more: keeping all of them would need n x N numbers twice
            rescaled = low + (kl - kl_low) * (high - low) / (kl_high - kl_low).clamp_min(1e-12)
            votes = torch.exp(self.sharpness * (k - 1)) - self.gamma * rescaled
            found.append(votes.view(len(k), self.num_classes_, -1).sum(-1))
        return torch.cat(found)

    def logits_grid(self, split: Split, settings: Sequence[Mapping[str, object]]) -> Iterator[Float[Tensor, "n C"]]:
        """Yield the logits under each setting; what they share is computed once, where n x m numbers fit thrice."""
        if len(split) * len(self.keys_) > GRID:
            yield from super().logits_grid(split, settings)
            return
        images, captions, kl = self._comparisons(split)
        shots, known = len(self.keys_) // self.num_classes_, {}
        kl_low, kl_high = kl.aminmax()
        kl_votes = kl.view(len(split), self.num_classes_, shots).sum(-1)
        for setting in settings:
            sharpness, gamma, delta = (setting.get(n, getattr(self, n)) for n in ("sharpness", "gamma", "delta"))
            if (sharpness, delta) not in known:
                k = torch.lerp(images, captions, delta)
                votes = torch.exp(sharpness * (k - 1)).view(len(split), self.num_classes_, shots).sum(-1)
                known[sharpness, delta] = (votes, *k.aminmax())
            votes, low, high = known[sharpness, delta]
            slope = (high - low) / (kl_high - kl_low).clamp_min(1e-12)
            yield votes - gamma * (shots * (low - slope * kl_low) + slope * kl_votes)

    def _compare_all(self, split: Split) -> Iterator[tuple[Float[Tensor, "b m"], Float[Tensor, "b m"]]]:
        return (self._compare(split.rows(rows)) for rows in torch.arange(len(split)).split(CHUNK))

    def _compare(self, split: Split) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
        images, captions, kl = self._comparisons(split)
        return torch.lerp(images, captions, self.delta), kl

    def _comparisons(self, split: Split) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"], Float[Tensor, "n m"]]:
        """Return how alike each row and the support's images, captions and (as a divergence) predictions are."""
        log_p = self._log_predictions(split)
        p = log_p.exp()
        kl = (p * log_p).sum(1, keepdim=True) - p @ self.log_predictions_.T
        return split.features(self.features) @ self.keys_.T, split.clip @ self.captions_.T, kl

    def _log_predictions(self, split: Split) -> Float[Tensor, "n C"]:
        return (split.zero_shot / (LOGIT_SCALE * self.temperature)).log_softmax(1)

    @staticmethod
    def _captions(task: FewShotTask) -> Float[Tensor, "n D"]:
        return task.text[task.support.y]


class TransCLIP(Predictor):
    """TransCLIP: all images of a split are classified together, as a mixture of Gaussians that CLIP's texts regularise.

        z_i  ~ p_i^lam exp((l_i + (25 / m) sum_j (w_ji + w_ij) z_j) / 50),    p = softmax(s0)
        l_ic = -sum_d (x_id - mu_cd)^2 / (2 v_d)

    z are the class probabilities, w_ij the cosine of row i to its m nearest images of the split (support images are
    rows too, with z at their labels). Eleven rounds of five updates of z, then of the means mu (unit length) and the
    shared variance v from all images, the support's weighing 50 gamma / N each against 1 / n. The logits are log z and
    a constant per row.

    Rows stand in one order, images of the split first. The released code mixes two orders in the few-shot case, which
    pairs neighbours with the wrong z; the formula is followed (`fs_rows_reordered` of the reference). As there, the
    nearest image of every row is taken for itself and left out, which costs support images one true neighbour.

    Args:
        features: the space of the Gaussians and the neighbours; the prior is always CLIP's `s0`.
        gamma: weight of the support; the authors choose among 0.002, 0.01, 0.02 and 0.2.
        lam: power of the prior; None is the authors' 0.5, and 1 without the support.
        neighbours: m.
        use_support: False is the authors' zero-shot variant; its means start at each class's 8 most confident images.

    Source: TransCLIP (arXiv 2406.01837), eq. 5-8; repository MaxZanella/transduction-for-vlms.
    """

    def __init__(
        self,
        features: str = "clip",
        gamma: float = 0.02,
        lam: float | None = None,
        neighbours: int = 3,
        use_support: bool = True,
    ) -> None:
        self.features, self.gamma, self.lam = features, gamma, lam
        self.neighbours, self.use_support = neighbours, use_support

    def fit(self, task: FewShotTask) -> TransCLIP:
        keep = slice(None) if self.use_support else slice(0)
        self.support_ = task.support.features(self.features)[keep]
        self.hot_ = one_hot(task.support.y, task.num_classes).float()[keep]
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        x, n = split.features(self.features), len(split)
        prior = split.zero_shot.log_softmax(1)
        z = prior.exp()
        mean, variance = self._initial_means(x, z), torch.full((x.shape[1],), 1 / x.shape[1])
        prior *= self.lam if self.lam is not None else 0.5 if self.use_support else 1.0
        near, labels = self._affinity(x)
        share = 50 * self.gamma / max(1, len(self.support_))
        own_sums, own_counts = share * self.hot_.T @ self.support_, share * self.hot_.sum(0)
        squares = x.norm(dim=0).square() / n + share * self.support_.norm(dim=0).square()
        for round_ in range(11):
            scaled = mean / variance
            likelihood = torch.addmm((mean * scaled).sum(1), x, scaled.T, beta=-0.5)
            for _ in range(5):
                log_z = torch.sparse.mm(near, z).add_(labels).mul_(25 / self.neighbours)
                log_z.add_(likelihood).div_(50).add_(prior)
                z = log_z.softmax(1)
            if round_ < 10:
                sums, counts = z.T @ x / n + own_sums, z.sum(0) / n + own_counts
                mean = normalize(sums, dim=1)
                variance = (squares - 2 * (mean * sums).sum(0) + counts @ mean.square()) / counts.sum()
                variance = variance.clamp_min(1e-12)  # a channel that never varies tells no classes apart
        return log_z

    def _affinity(self, x: Float[Tensor, "n D"]) -> tuple[Tensor, Float[Tensor, "n C"]]:
        """Return w_ij + w_ji between the images, sparse, and what the labels of the support add to each image."""
        n, rows = len(x), torch.cat([x, self.support_])
        neighbour, closeness = self._neighbours(rows, x)
        here, there = torch.arange(n).repeat_interleave(neighbour.shape[1]), neighbour[:n].flatten()
        index = torch.stack([torch.cat([here, there]), torch.cat([there, here])])
        near = torch.sparse_coo_tensor(
            index, closeness[:n].flatten().repeat(2), (n, n), check_invariants=True
        ).coalesce()
        labels = torch.zeros(n, self.hot_.shape[1])
        for j in range(neighbour.shape[1]):
            labels.index_add_(0, neighbour[n:, j], closeness[n:, j, None] * self.hot_)
        return near, labels

    def _neighbours(
        self, rows: Float[Tensor, "m D"], x: Float[Tensor, "n D"]
    ) -> tuple[Int64[Tensor, "m k"], Float[Tensor, "m k"]]:
        """Return the nearest images of the split for each row, but the nearest one, and their cosines."""
        count = min(self.neighbours + 1, len(x))
        found = [(part @ x.T).topk(count) for part in rows.split(1024)]
        return torch.cat([f.indices for f in found])[:, 1:], torch.cat([f.values for f in found])[:, 1:]

    def _initial_means(self, x: Float[Tensor, "n D"], z: Float[Tensor, "n C"]) -> Float[Tensor, "C D"]:
        if self.use_support:
            return normalize(self.hot_.T @ self.support_, dim=1)
        top = z.topk(min(8, len(z)), dim=0)
        return normalize((top.values[:, :, None] * x[top.indices]).sum(0), dim=1)
