"""Training: B linear heads at once, a plain loop for whatever else is learned by gradient, and a convex solver.

A head gives bias logits `a = W g`, optionally as the z-score of each row. With zero-shot logits `s0` and the
factor `u` of each image, its loss has two branches (AMU-Tuning, eq. 8-9):

    loss = (1 - lam) CE(a, y) + lam CE(s0 + beta * u * a, y)

lam = 0 trains the auxiliary classifier alone, lam = 1 the fused one alone. Heads differ in their data order,
learning rate, weight decay, lam, beta and u; they share features, labels and shape, so that one matrix product
serves all of them. The gradient is written out: it is short, and several times faster than autograd here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """B trained linear heads.

    Attributes:
        weight: one row per class.
        losses: per step the whole loss, the fused branch and the auxiliary branch (mean over the batch).
    """

    weight: Float[Tensor, "B C D"]
    losses: Float[Tensor, "B T 3"]


def epoch_orders(n: int, epochs: int, generator: torch.Generator) -> Int64[Tensor, "epochs n"]:
    """Return one random permutation of the n rows for each epoch."""
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(epochs)])


def cosine(lr: float, steps: int) -> Float[Tensor, " steps"]:
    """Return the learning rate of each step, `lr (1 + cos(pi t / steps)) / 2` for t = 0 ... steps - 1."""
    return lr * (1 + torch.cos(math.pi * torch.arange(steps, dtype=torch.float64) / steps)).float() / 2


def warmed_cosine(lr: float, epochs: int, steps_per_epoch: int) -> Float[Tensor, " steps"]:
    """Return the rates of CoOp's training recipe, constant inside an epoch: 1e-5 in epoch 0, then the cosine
    `lr (1 + cos(pi (e - 1) / epochs)) / 2` of epoch e, which therefore does not quite reach 0.
    """
    epoch = torch.arange(epochs, dtype=torch.float64)
    rates = lr * (1 + torch.cos(math.pi * (epoch - 1) / epochs)) / 2
    rates[0] = 1e-5
    return rates.float().repeat_interleave(steps_per_epoch)


def class_means(x: Float[Tensor, "n D"], y: Int64[Tensor, " n"], num_classes: int) -> Float[Tensor, "C D"]:
    """Return the mean row of each class, not re-normalised (AMU-Tuning, eq. 6)."""
    sums = torch.zeros(num_classes, x.shape[1], dtype=x.dtype).index_add_(0, y, x)
    return sums / torch.bincount(y, minlength=num_classes)[:, None]


def train_heads(
    x: Float[Tensor, "V n D"],
    zero_shot: Float[Tensor, "V n C"],
    y: Int64[Tensor, " n"],
    weight: Float[Tensor, "B C D"],
    orders: Int64[Tensor, "B epochs n"],
    *,
    lr: float | Sequence[float] = 1e-3,
    weight_decay: float | Sequence[float] = 0.01,
    lam: float | Sequence[float] = 0.5,
    beta: float | Sequence[float] = 1.0,
    factor: Float[Tensor, "B V n"] | None = None,
    standardised: bool = False,
    batch_size: int = 8,
    eps: float = 1e-4,
    picks: Int64[Tensor, "B epochs n"] | None = None,
    on_epoch: Callable[[int, Float[Tensor, "B C D"]], None] | None = None,
) -> Heads:
    """Train B heads side by side with AdamW and a cosine per step; the last, smaller batch of an epoch is kept.

    Args:
        x: unit rows of the support; V > 1 holds augmented views of the same images.
        zero_shot: `s0` of the same rows.
        weight: where each head starts; left untouched.
        orders: the rows in the order each head sees them, epoch by epoch.
        lr, weight_decay, lam, beta: one number, or one per head.
        factor: `u(s0)` of each row, 1 if absent.
        standardised: z-score the bias logits of each row before both losses (the released code does).
        picks: which view is shown at each place of `orders`; the first if absent.
        on_epoch: called after each epoch with its number, from 1, and the current weights (a live buffer).

    Returns:
        The weights after the last step and the losses of every step.

    Raises:
        ValueError: a per-head setting has another length than the number of heads.
    """
    heads, epochs, n = orders.shape
    lrs, decays, lams, betas = (
        _per_head(v, heads, name)
        for v, name in ((lr, "lr"), (weight_decay, "weight_decay"), (lam, "lam"), (beta, "beta"))
    )
    weight = weight.clone()
    gradient = torch.zeros_like(weight)
    optimiser = _adamw(weight, gradient, lrs, decays, eps)
    rates = [group["lr"] for group in optimiser.param_groups]
    steps_per_epoch = math.ceil(n / batch_size)
    decay = cosine(1.0, epochs * steps_per_epoch).tolist()
    losses = torch.empty(heads, epochs * steps_per_epoch, 3)
    lams, betas = lams[:, None], betas[:, None]
    rows, scores, hot = x.reshape(-1, x.shape[-1]), zero_shot.reshape(-1, zero_shot.shape[-1]), _one_hot(y, zero_shot)
    factors = None if factor is None else factor.reshape(heads, -1)
    if all(heads == 1 or v is None or v.stride(0) == 0 for v in (orders, picks)):  # one order for all heads
        orders, picks = orders[:1], None if picks is None else picks[:1]
    for epoch in range(epochs):
        for start in range(0, n, batch_size):
            step = epoch * steps_per_epoch + start // batch_size
            image = orders[:, epoch, start : start + batch_size]
            row = image if picks is None else picks[:, epoch, start : start + batch_size] * n + image
            strength = betas if factors is None else betas * factors.gather(1, row.expand(heads, -1))
            losses[:, step] = _loss_and_gradient(
                weight, rows[row], scores[row], hot[image], lams, strength, standardised, gradient
            )
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * decay[step]
            optimiser.step()
        if on_epoch is not None:
            on_epoch(epoch + 1, weight)
    return Heads(weight, losses)


def minimise(
    loss: Callable[[Int64[Tensor, " b"]], Float[Tensor, ""]],
    optimiser: torch.optim.Optimizer,
    orders: Int64[Tensor, "epochs n"],
    batch_size: int,
    rates: Float[Tensor, " T"],
    *,
    drop_last: bool = False,
    on_epoch: Callable[[int], None] | None = None,
) -> Float[Tensor, " T"]:
    """Minimise `loss(rows of the batch)` over the optimiser's parameters, by autograd; return the loss of each step.

    Args:
        orders: the rows of each epoch in the order they are seen.
        rates: the learning rate of each step.
        drop_last: leave out the smaller batch at the end of an epoch.
        on_epoch: called after each epoch with its number, from 1.

    A loss may also write the gradients itself and return a value without a graph.
    """
    epochs, n = orders.shape
    end = n - n % batch_size if drop_last else n
    losses = torch.empty(len(rates))
    step = 0
    for epoch in range(epochs):
        for start in range(0, end, batch_size):
            for group in optimiser.param_groups:
                group["lr"] = float(rates[step])
            optimiser.zero_grad()
            value = loss(orders[epoch, start : start + batch_size])
            if value.requires_grad:
                value.backward()
            optimiser.step()
            losses[step] = value.detach()
            step += 1
        if on_epoch is not None:
            on_epoch(epoch + 1)
    return losses


@dataclass(frozen=True)
class Convex:
    """Linear heads at the optimum of a convex loss, one for each penalty, in the order the penalties were given.

    Attributes:
        weight, intercept: the heads; the intercept is 0 where none was asked for.
        losses: value reached, penalty included.
        gradient_norms: the certificate: norm of the gradient reached, relative to the one at zero weights.
        evaluations: how often loss and gradient were computed.
    """

    weight: Float[Tensor, "P C D"]
    intercept: Float[Tensor, "P C"]
    losses: Float[Tensor, " P"]
    gradient_norms: Float[Tensor, " P"]
    evaluations: Int64[Tensor, " P"]


def solve_convex(
    x: Float[Tensor, "n D"],
    zero_shot: Float[Tensor, "n C"],
    y: Int64[Tensor, " n"],
    penalties: Sequence[float],
    *,
    lam: float = 0.0,
    strength: Float[Tensor, " n"] | None = None,
    intercept: bool = False,
    tolerance: float = 1e-4,
    max_evaluations: int = 1000,
) -> Convex:
    """Minimise the two-branch loss without z-score to its optimum, for a path of penalties.

        mean_i [(1 - lam) CE(a_i, y_i) + lam CE(s0_i + k_i a_i, y_i)] + penalty / 2 ||W||^2,    a = W x + b

    It is convex in W and b. The best W lies in the span of the rows of x, so where they are few (2 n <= D) all
    happens in n coordinates from one QR decomposition, exactly. Penalties are solved from strong to weak, each by
    L-BFGS on the full batch from where the two solutions before it point.

    Args:
        x: rows of the support; everything is computed in their precision.
        zero_shot: `s0`; without effect at lam = 0, which is plain logistic regression.
        penalties: each above 0, in any order.
        strength: k, beta u(s0) of each image; 1 if absent.
        intercept: also learn b, which is not penalised.
        tolerance: stop where the gradient's norm has fallen to this share of its norm at zero weights.
        max_evaluations: stop there in any case; the certificate tells.
    """
    reduced = 2 * len(x) <= x.shape[1]
    basis, corner = torch.linalg.qr(x.T) if reduced else (None, None)
    rows = corner.T if reduced else x
    if intercept:
        rows = torch.cat([rows, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    held = torch.ones(rows.shape[1], dtype=x.dtype)
    if intercept:
        held[-1] = 0
    s0 = zero_shot.to(x.dtype)
    k = torch.ones_like(s0[:, :1]) if strength is None else strength[:, None].to(x.dtype)
    hot = _one_hot(y, s0)
    branches = [(1 - lam, torch.ones_like(k), torch.zeros_like(s0)), (lam, k, s0)]
    branches = [branch for branch in branches if branch[0] > 0]

    def loss(weight: Float[Tensor, "C r"], penalty: float) -> tuple[float, Float[Tensor, "C r"]]:
        bias, slope, value = rows @ weight.T, torch.zeros_like(s0), 0.0
        for share, scale, base in branches:
            log_p = torch.addcmul(base, scale, bias).log_softmax(1)
            value -= share * torch.dot(hot.flatten(), log_p.flatten()).item() / len(x)
            slope.addcmul_(log_p.exp_().sub_(hot), scale, value=share / len(x))
        shrunk = weight * held
        return value + penalty / 2 * shrunk.square().sum().item(), torch.addmm(shrunk, slope.T, rows, beta=penalty)

    order = sorted(range(len(penalties)), key=lambda i: -penalties[i])
    zero = torch.zeros(hot.shape[1], rows.shape[1], dtype=x.dtype)
    stop = tolerance * loss(zero, 0.0)[1].norm().item()
    found: dict[int, tuple] = {}
    start, before = zero, None
    for step, i in enumerate(order):
        if step > 1 and penalties[order[step - 2]] > penalties[order[step - 1]]:
            ahead = math.log(penalties[order[step - 1]] / penalties[i])
            behind = math.log(penalties[order[step - 2]] / penalties[order[step - 1]])
            start, before = start + (ahead / behind) * (start - before), start
        else:
            before = start
        found[i] = _lbfgs(lambda weight, penalty=penalties[i]: loss(weight, penalty), start, stop, max_evaluations)
        start = found[i][0]
    solved = torch.stack([found[i][0] for i in range(len(penalties))])
    weight = solved[..., : rows.shape[1] - intercept]
    return Convex(
        weight=weight @ basis.T if reduced else weight,
        intercept=solved[..., -1] if intercept else torch.zeros_like(solved[..., 0]),
        losses=torch.tensor([found[i][1] for i in range(len(penalties))]),
        gradient_norms=torch.tensor([found[i][2] * tolerance / stop for i in range(len(penalties))]),
        evaluations=torch.tensor([found[i][3] for i in range(len(penalties))]),
    )


def _lbfgs(
    function: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    stop: float,
    max_evaluations: int,
    memory: int = 8,
) -> tuple[Tensor, float, float, int]:
    """Return the minimiser of a smooth convex function, its value, the norm of its gradient, and the evaluations."""
    point, (value, gradient), evaluations = start, function(start), 1
    pairs: list[tuple[Tensor, Tensor, float]] = []
    noise = 8 * torch.finfo(start.dtype).eps
    while (norm := gradient.norm().item()) > stop and evaluations < max_evaluations:
        direction = _newton_like(gradient, pairs) if pairs else gradient / norm
        descent, step = torch.dot(gradient.flatten(), direction.flatten()).item(), 1.0
        while True:
            following = point - step * direction
            new_value, new_gradient = function(following)
            evaluations += 1
            if new_value <= value - 1e-4 * step * descent + noise * abs(value) or evaluations >= max_evaluations:
                break
            step /= 2
            if step < 1e-3 and pairs:  # rounding has spoilt the memory: forget it and take the gradient
                pairs, direction = [], gradient / norm
                descent, step = norm, 1.0
        moved, turned = following - point, new_gradient - gradient
        curvature = torch.dot(moved.flatten(), turned.flatten()).item()
        if curvature > 0:
            pairs = [*pairs[1 - memory :], (moved, turned, 1 / curvature)]
        point, value, gradient = following, new_value, new_gradient
    return point, value, norm, evaluations


def _newton_like(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Return the inverse Hessian that the pairs (step, change of gradient, 1 / product) imply, times the gradient."""
    direction, shares = gradient.clone(), []
    for moved, turned, inverse in reversed(pairs):
        shares.append(inverse * torch.dot(moved.flatten(), direction.flatten()).item())
        direction.add_(turned, alpha=-shares[-1])
    _, turned, inverse = pairs[-1]
    direction.mul_(1 / (inverse * turned.square().sum().item()))
    for (moved, turned, inverse), share in zip(pairs, reversed(shares), strict=True):
        direction.add_(moved, alpha=share - inverse * torch.dot(turned.flatten(), direction.flatten()).item())
    return direction


def _loss_and_gradient(weight, features, zero_shot, hot, lam, strength, standardised, gradient):
    """Write the gradient of each head's loss into `gradient`; return the three losses of each head, `[B, 3]`.

    With a the bias logits, p = softmax(a), q = softmax(s0 + k a) and k = beta u, all per image,

        d loss / d a = ((1 - lam)(p - Y) + lam k (q - Y)) / b

    and through a z-score z = (a - mean) / std with C - 1 in the variance,

        d loss / d a = (g - mean(g) - z sum(g z) / (C - 1)) / std,  g = d loss / d z.
    """
    heads, classes, width = weight.shape
    together = len(features) == 1  # all heads see the same rows: one product instead of one per head
    if together:
        raw = (features[0] @ weight.view(-1, width).T).view(-1, heads, classes).transpose(0, 1)
    else:
        raw = torch.bmm(features, weight.transpose(1, 2))
    if standardised:
        std, mean = torch.std_mean(raw, dim=-1, keepdim=True)
        std = std.clamp_min(1e-4)  # a row of equal logits (zero initialisation) has no direction to be scaled along
        bias = (raw - mean) / std
    else:
        bias = raw
    log_p = bias.log_softmax(-1)
    log_q = torch.addcmul(zero_shot, strength[..., None], bias).log_softmax(-1)
    fused, auxiliary = (-(hot * log).sum(-1).mean(-1) for log in (log_q, log_p))
    size = hot.shape[1]
    grad = ((1 - lam) / size)[..., None] * (log_p.exp() - hot) + (lam * strength / size)[..., None] * (
        log_q.exp() - hot
    )
    if standardised:
        along = (grad * bias).sum(-1, keepdim=True) / (bias.shape[-1] - 1)
        grad = (grad - grad.mean(-1, keepdim=True) - bias * along) / std
    if together:
        torch.mm(grad.permute(0, 2, 1).reshape(heads * classes, -1), features[0], out=gradient.view(-1, width))
    else:
        torch.bmm(grad.transpose(1, 2), features, out=gradient)
    share = lam[:, 0]
    return torch.stack([(1 - share) * auxiliary + share * fused, fused, auxiliary], dim=-1)


def _adamw(weight, gradient, lrs, decays, eps):
    """Return torch's fused AdamW over one buffer; neighbouring heads with the same settings are one parameter."""
    groups, start = [], 0
    for stop in range(1, len(weight) + 1):
        if stop == len(weight) or (lrs[stop], decays[stop]) != (lrs[start], decays[start]):
            parameter = weight[start:stop]
            parameter.grad = gradient[start:stop]
            groups.append({"params": [parameter], "lr": float(lrs[start]), "weight_decay": float(decays[start])})
            start = stop
    return torch.optim.AdamW(groups, eps=eps, fused=True)


def _per_head(value: float | Sequence[float], heads: int, name: str) -> Float[Tensor, " B"]:
    found = torch.as_tensor(value, dtype=torch.float32)
    if found.ndim == 1 and len(found) != heads:
        raise ValueError(f"{name} has {len(found)} values for {heads} heads")
    return found.expand(heads)


def _one_hot(y: Int64[Tensor, " n"], like: Tensor) -> Float[Tensor, "n C"]:
    return torch.nn.functional.one_hot(y, like.shape[-1]).to(like.dtype)
