"""Training: B linear heads at once, and a plain loop for whatever else is learned by gradient.

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
    steps_per_epoch = math.ceil(n / batch_size)
    decay = cosine(1.0, epochs * steps_per_epoch)
    losses = torch.empty(heads, epochs * steps_per_epoch, 3)
    lams, betas = lams[:, None], betas[:, None]
    rows, scores, hot = x.reshape(-1, x.shape[-1]), zero_shot.reshape(-1, zero_shot.shape[-1]), _one_hot(y, zero_shot)
    factors = None if factor is None else factor.reshape(heads, -1)
    for epoch in range(epochs):
        for start in range(0, n, batch_size):
            step = epoch * steps_per_epoch + start // batch_size
            image = orders[:, epoch, start : start + batch_size]
            row = image if picks is None else picks[:, epoch, start : start + batch_size] * n + image
            strength = betas if factors is None else betas * factors.gather(1, row)
            features = rows[row]
            losses[:, step] = _loss_and_gradient(
                weight, features, scores[row], hot[image], lams, strength, standardised, gradient
            )
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * float(decay[step])
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


def _loss_and_gradient(weight, features, zero_shot, hot, lam, strength, standardised, gradient):
    """Write the gradient of each head's loss into `gradient`; return the three losses of each head, `[B, 3]`.

    With a the bias logits, p = softmax(a), q = softmax(s0 + k a) and k = beta u, all per image,

        d loss / d a = ((1 - lam)(p - Y) + lam k (q - Y)) / b

    and through a z-score z = (a - mean) / std with C - 1 in the variance,

        d loss / d a = (g - mean(g) - z sum(g z) / (C - 1)) / std,  g = d loss / d z.
    """
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
    torch.bmm(grad.transpose(1, 2), features, out=gradient)
    share = lam[:, 0]
    return torch.stack([(1 - share) * auxiliary + share * fused, fused, auxiliary], dim=-1)


def _adamw(weight, gradient, lrs, decays, eps):
    """Return torch's fused AdamW over the heads of one buffer, grouped by learning rate and weight decay."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for head in range(len(weight)):
        parameter = weight[head]
        parameter.grad = gradient[head]
        groups.setdefault((float(lrs[head]), float(decays[head])), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": lr, "initial_lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()],
        eps=eps,
        fused=True,
    )


def _per_head(value: float | Sequence[float], heads: int, name: str) -> Float[Tensor, " B"]:
    found = torch.as_tensor(value, dtype=torch.float32)
    if found.ndim == 1 and len(found) != heads:
        raise ValueError(f"{name} has {len(found)} values for {heads} heads")
    return found.expand(heads)


def _one_hot(y: Int64[Tensor, " n"], like: Tensor) -> Float[Tensor, "n C"]:
    return torch.nn.functional.one_hot(y, like.shape[-1]).to(like.dtype)
