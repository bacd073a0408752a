"""Scores that tell images of a task's classes (higher) from images of unknown ones, and local outliers of a set.

Parameters name the arrays, see `table`: `logits` and `features` of the images to judge; `train`, `train_logits` and
`train_y`, features, logits and labels of labelled images; `weight` and `offset` of a linear head, so that
`logits = features weight^T + offset`; `negated`, 100 cos to texts that say the class is absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from lib import metrics
from lib.features import LOGIT_SCALE
from lib.metrics import Logits
from lib.scores.confidence import CONFIDENCES, Confidence

Rows = Float[Tensor, "n D"]
TrainRows = Float[Tensor, "m D"]
Weight = Float[Tensor, "C D"]
Offset = Float[Tensor, " C"]
LARGEST = 1000.0  # what a local score becomes among more than k copies of one row, as in the released code


def mcm(logits: Logits, tau: float = 1.0) -> Confidence:
    """`max softmax(cos / tau)` of logits 100 cos; at tau = 0.01 the maximum probability (arXiv 2211.13445)."""
    return CONFIDENCES["max probability"](logits / LOGIT_SCALE / tau)


def react(features: Rows, train: TrainRows, weight: Weight, offset: Offset, share: float = 0.99) -> Confidence:
    """Energy of the head on features clipped from above at the `share`-quantile of all entries of `train`.

    Source: ReAct (arXiv 2111.12797), eq. 1; repository haoqiwang/vim, benchmark.py.
    """
    level = torch.tensor(np.quantile(train.double().numpy(), share))  # torch refuses more than 2^24 entries
    return (features.double().minimum(level) @ weight.double().T + offset.double()).logsumexp(-1)


def knn(features: Rows, train: TrainRows, k: int = 5) -> Confidence:
    """Minus the squared distance to the k-th nearest unit row of `train`, k at most their number.

    Source: arXiv 2204.06507, eq. 3; OpenOOD, knn_postprocessor.py, which squares it.
    """
    keys, k = normalize(train, dim=1), min(k, len(train))
    parts = normalize(features, dim=1).split(4096)
    return torch.cat([2 * (part @ keys.T).topk(k).values[:, -1] - 2 for part in parts])


def mahalanobis(features: Rows, train: TrainRows, train_y: Int64[Tensor, " m"]) -> Confidence:
    """Minus the least squared Mahalanobis distance to a class mean, under the covariance that the classes share.

    The covariance (divisor m) is inverted on its own span, which few images leave small. Source: arXiv 1807.03888.
    """
    x, rows = train.double(), features.double()
    means = metrics.class_means(x, train_y, int(train_y.max()) + 1)
    means = means[~means.isnan().any(dim=1)]
    present = train_y.unique(return_inverse=True)[1]
    precision = torch.linalg.pinv((x - means[present]).T @ (x - means[present]) / len(x), hermitian=True)
    squares = [(rows @ precision * rows).sum(1, keepdim=True), ((means @ precision) * means).sum(1)]
    return -(squares[0] + squares[1] - 2 * rows @ precision @ means.T).amin(1)


def kl_matching(logits: Logits, train_logits: Float[Tensor, "m C"]) -> Confidence:
    """Minus the least divergence KL(p || q_c), q_c the mean probabilities of the images that are *predicted* c.

    A class that is never predicted has none and is left out. Source: arXiv 1911.11132; haoqiwang/vim, benchmark.py.
    """
    p, q = (v.double().softmax(-1) for v in (logits, train_logits))
    means = metrics.class_means(q, metrics.predictions(train_logits), q.shape[1])
    means = means[~means.isnan().any(dim=1)].clamp_min(torch.finfo(q.dtype).tiny)
    return (torch.special.entr(p).sum(1, keepdim=True) + p @ means.log().T).amax(1)


def residual_axes(train: TrainRows, weight: Weight, offset: Offset) -> tuple[Float[Tensor, " D"], Float[Tensor, "D r"]]:
    """ViM's origin `u = -pinv(W) b` and the directions in which `train - u` spreads least, as orthonormal columns.

    They are what the principal 1000 (D >= 2048), 512 (D >= 768) or D // 2 directions leave; of second moments about u,
    not of a covariance.
    """
    dims = train.shape[1]
    principal = 1000 if dims >= 2048 else 512 if dims >= 768 else dims // 2
    origin = -torch.linalg.pinv(weight.double()) @ offset.double()
    x = train.double() - origin
    return origin, torch.linalg.eigh(x.T @ x / len(x)).eigenvectors[:, : dims - principal]  # ascending


def residual(features: Rows, train: TrainRows, weight: Weight, offset: Offset) -> Confidence:
    """Minus the length of `features - u` outside the principal subspace, see `residual_axes` (ViM, section 4)."""
    return _residual(features, *residual_axes(train, weight, offset))


def vim(
    logits: Logits,
    features: Rows,
    train: TrainRows,
    train_logits: Float[Tensor, "m C"],
    weight: Weight,
    offset: Offset,
) -> Confidence:
    """`logsumexp(s) - alpha * residual`, alpha the mean largest logit over the mean residual of `train`.

    Where `train` has no residual, fewer images than principal directions, nothing is subtracted.
    Source: ViM (arXiv 2203.10807), eq. 5-6; repository haoqiwang/vim, benchmark.py.
    """
    space = residual_axes(train, weight, offset)
    length = -_residual(train, *space).mean()
    alpha = train_logits.double().amax(1).mean() / length if length > 1e-9 * train.norm(dim=1).mean() else 0.0
    return logits.double().logsumexp(1) + alpha * _residual(features, *space)


def _residual(features: Rows, origin: Float[Tensor, " D"], axes: Float[Tensor, "D r"]) -> Confidence:
    return -((features.double() - origin) @ axes).norm(dim=1)


def competing_to_win(logits: Logits, negated: Logits) -> Confidence:
    """CLIPN's CTW: the probability that the predicted class is there, `p_c = 1 / (1 + exp(negated_c - s_c))`.

    Source: CLIPN (arXiv 2308.12213), eq. 9; repository xmed-lab/CLIPN, zero_shot_infer.py.
    """
    return (logits - negated).sigmoid().gather(1, metrics.predictions(logits)[:, None])[:, 0]


def agreeing_to_differ(logits: Logits, negated: Logits) -> Confidence:
    """CLIPN's ATD, as released: `sum_c p_c softmax(s)_c`, 1 minus the probability of a class "unknown" (eq. 10)."""
    return ((logits - negated).sigmoid() * logits.softmax(-1)).sum(-1)


UNKNOWN: dict[str, Callable[..., Confidence]] = {
    **{name: CONFIDENCES[name] for name in ("max probability", "max logit", "energy")},
    "MCM": mcm,
    "KL matching": kl_matching,
    "KNN": knn,
    "Mahalanobis": mahalanobis,
    "Residual": residual,
    "ReAct": react,
    "ViM": vim,
    "CLIPN, CTW": competing_to_win,
    "CLIPN, ATD": agreeing_to_differ,
}


def fpr95(inliers: Float[Tensor, " n"], outliers: Float[Tensor, " m"]) -> float:
    """Share of outliers at or above the threshold that keeps 95 % of the inliers; NaN without either.

    The threshold is the floor(0.95 n)-th largest score of an inlier, as in haoqiwang/vim; OpenOOD turns the roles.
    """
    if not len(inliers) or not len(outliers):
        return math.nan
    level = inliers.sort(descending=True).values[max(int(0.95 * len(inliers)), 1) - 1]
    return (outliers >= level).double().mean().item()


def neighbours(features: Rows, k: int) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """Distances to the k nearest other rows, ascending, and which rows they are; k at most n - 1.

    A row is never its own neighbour, and an index is one of `features`: the released code drops the diagonal and then
    looks rows up by where they stood after that.
    """
    if len(features) < 2:
        raise ValueError(f"local outliers need at least 2 rows, not {len(features)}")
    x = features.double().numpy()
    distance, index = NearestNeighbors(n_neighbors=min(k, len(x) - 1)).fit(x).kneighbors()
    return torch.from_numpy(distance), torch.from_numpy(index)


def k_distance(features: Rows, k: int = 16) -> Float[Tensor, " n"]:
    """Distance to the k-th nearest other row; more is more of an outlier, as in the three that follow."""
    return neighbours(features, k)[0][:, -1]


def _dimensionality(distance: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    ratio = distance / distance[:, -1:].clamp_min(torch.finfo(distance.dtype).tiny)
    return _bounded(-distance.shape[1] / (ratio + 1e-4).log().sum(1))


def lid(features: Rows, k: int = 16) -> Float[Tensor, " n"]:
    """Local intrinsic dimensionality, `-k / sum_j log(r_j / r_k + 1e-4)`, the maximum-likelihood estimate."""
    return _dimensionality(neighbours(features, k)[0])


def slof(features: Rows, k: int = 16) -> Float[Tensor, " n"]:
    """Simplified local outlier factor: the mean of `d_k(x) / d_k(j)` over the k nearest rows j."""
    distance, index = neighbours(features, k)
    return _bounded((distance[:, -1:] / distance[:, -1][index]).mean(1))


def dao(features: Rows, k: int = 16) -> Float[Tensor, " n"]:
    """Dimensionality-aware outlier score: the mean of `LID(j) log(d_k(x) / d_k(j))` over the k nearest rows j.

    Source: arXiv 2401.05453; repository HanxunH/Detect-CLIP-Backdoor-Samples, dao.py, neighbours put right.
    """
    distance, index = neighbours(features, k)
    return _bounded((_dimensionality(distance)[index] * (distance[:, -1:] / distance[:, -1][index]).log()).mean(1))


def _bounded(values: Tensor) -> Tensor:
    return values.nan_to_num(LARGEST, LARGEST, -LARGEST)


LOCAL_OUTLIERS: dict[str, Callable[..., Float[Tensor, " n"]]] = {
    "k-distance": k_distance,
    "SLOF": slof,
    "LID": lid,
    "DAO": dao,
}
