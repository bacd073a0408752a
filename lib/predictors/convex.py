"""A solver for linear heads whose loss is convex: AMU-Tuning's two branches without the z-score, logistic regression.

    mean_i [(1 - lam) CE(a_i, y_i) + lam CE(s0_i + u_i a_i, y_i)] + penalty / 2 ||W||^2,    a = W x + b

The best W is a combination of the support's rows. Where these are few (n < D), X^T = Q R gives W = V Q^T and
X W^T = R^T V^T: V has n columns in place of D. Logits are linear along a direction: a line search needs no product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

MEMORY = 5  # steps that L-BFGS remembers
EVALUATIONS = 1000  # gradients after which it stops in any case, for each penalty


@dataclass(frozen=True)
class Convex:
    """Linear heads at the optimum of a convex loss, one for each penalty, in the order the penalties were given."""

    weight: Float[Tensor, "P C D"]
    intercept: Float[Tensor, "P C"]  # 0 where none was asked for
    losses: Float[Tensor, " P"]  # value reached, penalty included
    gradient_norms: Float[Tensor, " P"]  # the certificate: norm of the gradient, relative to the one at zero weights
    evaluations: Int64[Tensor, " P"]  # gradients computed


def solve_path(
    x: Float[Tensor, "n D"],
    zero_shot: Float[Tensor, "n C"],
    y: Int64[Tensor, " n"],
    penalties: Sequence[float],  # each above 0, in any order
    *,
    lam: float = 0.0,  # at 0, plain logistic regression, `s0` is without effect
    u: Float[Tensor, " n"] | None = None,  # weight of each image's bias in the fused branch, beta included; 1 if absent
    intercept: bool = False,  # also learn b, which is not penalised
    tolerance: float = 1e-4,  # norm of the gradient to stop at, relative to the one at zero weights
) -> Convex:
    """Minimise the loss above, in the precision of `x`, for each penalty.

    Penalties go from strong to weak, each warm-started by extrapolating the last two solutions.
    """
    if min(penalties) <= 0:
        raise ValueError(f"penalties must be above 0, not {min(penalties)}")
    (n, dim), classes, first = x.shape, zero_shot.shape[1], torch.arange(len(x))
    basis, triangle = torch.linalg.qr(x.T) if n < dim else (None, None)
    rows = x if basis is None else triangle.T.contiguous()
    width = rows.shape[1]
    rows = torch.cat([rows, rows.new_ones(n, 1)], 1) if intercept else rows
    branches = [(1 - lam, 1.0, 0.0), (lam, 1.0 if u is None else u[:, None].to(x.dtype), zero_shot.to(x.dtype))]

    def loss(logits: Float[Tensor, "n C"]) -> tuple[float, Float[Tensor, "n C"]]:
        """Mean loss without the penalty, and its gradient by the logits."""
        value, gradient = 0.0, torch.zeros_like(logits)
        for weight, scale, base in branches:
            if weight > 0:
                log_p = (base + scale * logits).log_softmax(1)
                value -= weight * log_p[first, y].mean().item()
                p = log_p.exp_()
                p[first, y] -= 1
                gradient += weight / n * scale * p
        return value, gradient

    ridge, point, logits = x.new_zeros(rows.shape[1], 1), x.new_zeros(rows.shape[1], classes), x.new_zeros(n, classes)
    solutions, past, pairs, norm_at_zero = {}, [], [], (rows.T @ loss(logits)[1]).norm().item()
    for i in sorted(range(len(penalties)), key=lambda i: -penalties[i]):
        at, change = math.log(penalties[i]), penalties[i] - ridge[0].item()
        if len(past) == 2 and past[0][0] > past[1][0]:
            ahead = (past[0][0] - at) / (past[0][0] - past[1][0])
            point, logits = (torch.lerp(*ends, ahead) for ends in zip(past[0][1:], past[1][1:], strict=True))
        ridge[:width] = penalties[i]
        pairs = [(s, d + change * (ridge > 0) * s) for s, d in pairs]  # curvature under the new penalty
        point, logits, *reached = _descend(loss, rows, ridge, point, logits, pairs, tolerance * norm_at_zero)
        past = [*past[-1:], (at, point, logits)]
        solutions[i] = (point, *reached)
    points, losses, norms, evaluations = zip(*(solutions[i] for i in range(len(penalties))), strict=True)
    points = torch.stack(points)
    weight = points[:, :width].mT
    return Convex(
        weight=weight.contiguous() if basis is None else weight @ basis.T,
        intercept=points[:, -1] if intercept else points.new_zeros(len(points), classes),
        losses=torch.tensor(losses),
        gradient_norms=torch.tensor(norms) / (norm_at_zero or 1.0),
        evaluations=torch.tensor(evaluations),
    )


def _descend(
    loss: Callable, rows: Tensor, ridge: Tensor, point: Tensor, logits: Tensor, pairs: list, target: float
) -> tuple[Tensor, Tensor, float, float, int]:
    """L-BFGS from a point [d, C] with its logits; point, logits, loss, norm of the gradient, gradients computed."""
    value, by_logits = loss(logits)
    gradient = rows.T @ by_logits + ridge * point
    for evaluations in range(1, EVALUATIONS + 1):
        norm = gradient.norm().item()
        if norm <= target or evaluations == EVALUATIONS:
            break
        direction = _quasi_newton(gradient, pairs)
        step = _search(loss, rows, ridge, point, logits, value, gradient, direction)
        if step is None:
            if not pairs:
                break  # no descent within rounding; the certificate says how far the gradient is from 0
            pairs.clear()  # rounding has spoilt the memory: follow the gradient
            continue
        length, logits, value, by_logits = step
        point = point + length * direction
        before, gradient = gradient, rows.T @ by_logits + ridge * point
        if _dot(direction, gradient - before) > 0:
            pairs.append((length * direction, gradient - before))
            del pairs[:-MEMORY]
    return point, logits, value + (ridge * point.square()).sum().item() / 2, norm, evaluations


def _quasi_newton(gradient: Float[Tensor, "d C"], pairs: list[tuple[Tensor, Tensor]]) -> Float[Tensor, "d C"]:
    """Direction of L-BFGS (Nocedal and Wright, algorithm 7.4) from steps and the changes of the gradient along them."""
    if not pairs:
        return -gradient / gradient.norm()
    direction, alphas = -gradient, []
    for step, change in reversed(pairs):
        alphas.append(_dot(step, direction) / _dot(step, change))
        direction = direction - alphas[-1] * change
    direction = direction * (_dot(step := pairs[-1][0], pairs[-1][1]) / _dot(pairs[-1][1], pairs[-1][1]))
    for step, change in pairs:
        direction = direction + (alphas.pop() - _dot(change, direction) / _dot(step, change)) * step
    return direction


def _search(loss, rows, ridge, point, logits, value, gradient, direction):
    """Length of a step along the direction, with logits, loss and its gradient there; None without descent.

    The derivative along the line rises from negative to positive: its zero is bracketed, then cut in by secants.
    """
    change, slope = rows @ direction, _dot(gradient, direction)
    linear, curvature = _dot(ridge * point, direction), _dot(ridge * direction, direction)
    noise = 8 * torch.finfo(logits.dtype).eps * abs(value)
    low, high, length = (0.0, slope), None, 1.0
    for _ in range(20):
        reached = torch.add(logits, change, alpha=length)
        now, by_logits = loss(reached)
        derivative = _dot(by_logits, change) + linear + length * curvature
        lower = now + length * linear + length**2 / 2 * curvature <= value + noise
        if lower and 0.5 * slope <= derivative <= -0.3 * slope:
            return length, reached, now, by_logits
        if derivative > 0 or not lower:
            high = (length, abs(derivative))
        else:
            low = (length, derivative)
        if high is None:
            length *= 2
        else:
            fraction = min(max(low[1] / (low[1] - high[1]), 0.1), 0.9)
            length = low[0] + fraction * (high[0] - low[0])
    return None


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.flatten(), b.flatten()).item()
