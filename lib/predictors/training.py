"""Training: B linear heads at once, and a plain loop for whatever else is learned by gradient.

    loss = (1 - lam) CE(a, y) + lam CE(s0 + beta u a, y),    a = W g or its z-score    (AMU-Tuning, eq. 8-9)

Heads differ in start, lam, beta and u; they share all else, so that one matrix product serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import one_hot

Orders = Int64[Tensor, "epochs visits"]  # rows in the order of training; an epoch need not hold each row once
CACHED = 800_000  # weights trained at a time on a thread; with gradients and moments they stay in a core's cache


class Heads(NamedTuple):
    """B trained linear heads."""

    weight: Float[Tensor, "B C D"]
    losses: Float[Tensor, "B T 3"]  # of each step, mean over the batch: whole loss, fused branch, auxiliary branch


def in_threads(work: Callable, items: Sequence) -> list:
    """`work(item)` of each item, side by side on as many threads as torch may use, one thread each."""
    threads = torch.get_num_threads()
    if min(threads, len(items)) < 2:
        return [work(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)


def epoch_orders(n: int, epochs: int, generator: torch.Generator) -> Orders:
    """One random permutation of the n rows for each epoch."""
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(epochs)])


def cosine(lr: float, steps: int) -> Float[Tensor, " steps"]:
    """Learning rate of each step, `lr (1 + cos(pi t / steps)) / 2` for t = 0 ... steps - 1."""
    return lr * (1 + torch.cos(math.pi * torch.arange(steps, dtype=torch.float64) / steps)).float() / 2


def warmed_cosine(lr: float, epochs: int, steps_per_epoch: int) -> Float[Tensor, " steps"]:
    """Learning rates of CoOp's recipe: 1e-5 in epoch 0, then `lr (1 + cos(pi (e - 1) / epochs)) / 2` in epoch e."""
    epoch = torch.arange(epochs, dtype=torch.float64)
    rates = lr * (1 + torch.cos(math.pi * (epoch - 1) / epochs)) / 2
    rates[0] = 1e-5
    return rates.float().repeat_interleave(steps_per_epoch)


@torch.no_grad()
def train_heads(
    x: Float[Tensor, "V n D"],
    zero_shot: Float[Tensor, "V n C"],
    y: Int64[Tensor, " n"],
    weight: Float[Tensor, "B C D"],
    orders: Orders,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    lam: float | Sequence[float] = 0.5,  # one number, or one per head, as beta
    beta: float | Sequence[float] = 1.0,
    u: Float[Tensor, "B V n"] | None = None,  # `u(s0)` of each row, 1 if absent
    standardised: bool = False,  # z-score the bias logits of each row before both losses (the released code does)
    batch_size: int = 8,
    eps: float = 1e-4,
    picks: Orders | None = None,  # view at each place of `orders`; the first if absent
    rates: Float[Tensor, " T"] | None = None,  # what `lr` is multiplied by at each step; a cosine from 1 if absent
    watch: Callable[[int, slice, Float[Tensor, "b C D"]], None] | None = None,
) -> Heads:
    """Train B heads with AdamW, some at a time on each of torch's threads; the last, smaller batch is kept.

    V > 1 holds augmented views of the same images. After each epoch `watch` gets its number (from 0), the slice of the
    heads that are trained together and their current weights (a live buffer).
    """
    (heads, classes, _), n = weight.shape, len(y)
    for name, value in (("lam", lam), ("beta", beta)):
        if isinstance(value, Sequence) and len(value) != heads:
            raise ValueError(f"{name} has {len(value)} values for {heads} heads")
    lams, betas = (torch.as_tensor(value, dtype=x.dtype).expand(heads)[:, None] for value in (lam, beta))
    rows, scores, labels = x.flatten(0, 1), zero_shot.flatten(0, 1)[:, None], one_hot(y, classes).to(x.dtype)[:, None]
    k = (betas * (x.new_ones(heads, len(rows)) if u is None else u.flatten(1))).T[..., None]
    steps = len(orders) * math.ceil(orders.shape[1] / batch_size)
    scales = (lr * (cosine(1.0, steps) if rates is None else rates)).tolist()
    trained = Heads(torch.empty_like(weight), torch.empty(heads, steps, 3))

    def train(group: slice) -> None:
        columns = weight[group].flatten(0, 1).T.contiguous()  # [D, b C]: one product serves all heads of the group
        columns.grad, weights = torch.zeros_like(columns), columns.T.unflatten(0, (-1, classes))
        optimiser = torch.optim.AdamW([columns], weight_decay=weight_decay, eps=eps, fused=True)
        losses, schedule = [], iter(scales)
        for epoch, order in enumerate(orders):
            places = order if picks is None else order + n * picks[epoch]
            visits = rows[places], scores[places], k[places, group], labels[order]
            for seen, *constants in zip(*(part.split(batch_size) for part in visits), strict=True):
                bias = (seen @ columns).unflatten(1, (-1, classes))
                step_losses, gradient = _branches(bias, *constants, lams[group], standardised)
                losses.append(step_losses)
                torch.mm(seen.T, gradient.flatten(1), out=columns.grad)
                optimiser.param_groups[0]["lr"] = next(schedule)
                optimiser.step()
            if watch is not None:
                watch(epoch, group, weights)
        auxiliary, fused = torch.stack(losses, -1)
        trained.weight[group] = weights
        trained.losses[group] = torch.stack([torch.lerp(auxiliary, fused, lams[group]), fused, auxiliary], -1)

    threads = torch.get_num_threads()
    groups = min(heads, threads * math.ceil(weight.numel() / (threads * CACHED)))
    in_threads(train, [slice(*edges) for edges in pairwise(heads * i // groups for i in range(groups + 1))])
    return trained


def _branches(
    a: Float[Tensor, "m b C"], s0: Tensor, k: Tensor, labels: Tensor, lam: Tensor, standardised: bool
) -> tuple[Float[Tensor, "2 b"], Float[Tensor, "m b C"]]:
    """Auxiliary and fused loss, and the gradient by the bias logits a.

    With p = softmax(a), q = softmax(s0 + k a), k = beta u, and Y the one-hot labels,

        d loss / d a = ((1 - lam) (p - Y) + lam k (q - Y)) / m

    and through the z-score z = (a - mean) / std, C - 1 in the variance, g = d loss / d z,

        d loss / d a = (g - mean(g) - z sum(g z) / (C - 1)) / std
    """
    if standardised:
        std, mean = torch.std_mean(a, dim=-1, keepdim=True)
        std.clamp_min_(1e-4)  # a row of equal logits (zero initialisation) has no direction to be scaled along
        a = (a - mean) / std
    log_p = torch.stack([a, torch.addcmul(s0, k, a)]).log_softmax(-1)
    losses = -(log_p * labels).sum(-1).mean(1)
    p, q = log_p.exp_().sub_(labels)
    gradient = torch.lerp(p, q.mul_(k), lam).div_(len(a))
    if standardised:
        along = (gradient * a).sum(-1, keepdim=True) / (a.shape[-1] - 1)
        gradient = (gradient - gradient.mean(-1, keepdim=True) - along * a) / std
    return losses, gradient


def minimise(
    loss: Callable[[Int64[Tensor, " b"]], Float[Tensor, ""]],
    optimiser: torch.optim.Optimizer,
    orders: Orders,
    batch_size: int,
    rates: Float[Tensor, " T"] | None = None,
) -> Float[Tensor, " T"]:
    """Losses of all steps while autograd minimises `loss(rows of the batch)`.

    `rates` are the learning rates of the steps; a cosine from the optimiser's own if absent.
    """
    batches, losses = [batch for epoch in orders for batch in epoch.split(batch_size)], []
    rates = cosine(optimiser.defaults["lr"], len(batches)) if rates is None else rates
    for batch, rate in zip(batches, rates.tolist(), strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        value = loss(batch)
        value.backward()
        optimiser.step()
        losses.append(value.detach())
    return torch.stack(losses)
