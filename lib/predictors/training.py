"""Training: B linear heads at once, and a plain loop for whatever else is learned by gradient.

    loss = (1 - lam) CE(a, y) + lam CE(s0 + beta u a, y),    a = W g or its z-score    (AMU-Tuning, eq. 8-9)

Heads differ in start, lam, beta and u; they share all else, so that one matrix product serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Heads:
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


def epoch_orders(n: int, epochs: int, generator: torch.Generator) -> Int64[Tensor, "epochs n"]:
    """One random permutation of the n rows for each epoch."""
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(epochs)])


def cosine(lr: float, steps: int) -> Float[Tensor, " steps"]:
    """Learning rate of each step, `lr (1 + cos(pi t / steps)) / 2` for t = 0 ... steps - 1."""
    return lr * (1 + torch.cos(math.pi * torch.arange(steps, dtype=torch.float64) / steps)).float() / 2


def warmed_cosine(lr: float, epochs: int, steps_per_epoch: int) -> Float[Tensor, " steps"]:
    """Learning rates of CoOp's recipe, constant inside an epoch: 1e-5 in epoch 0, then the cosine
    `lr (1 + cos(pi (e - 1) / epochs)) / 2` of epoch e, which therefore does not quite reach 0.
    """
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
    orders: Int64[Tensor, "epochs m"],
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    lam: float | Sequence[float] = 0.5,
    beta: float | Sequence[float] = 1.0,
    u: Float[Tensor, "B V n"] | None = None,
    standardised: bool = False,
    batch_size: int = 8,
    eps: float = 1e-4,
    picks: Int64[Tensor, "epochs m"] | None = None,
    rates: Float[Tensor, " T"] | None = None,
    watched: Container[int] = (),
    watch: Callable[[slice, Float[Tensor, "b C D"]], None] | None = None,
) -> Heads:
    """Train B heads with AdamW, a group of them on each of torch's threads; the last, smaller batch is kept.

    Args:
        x: unit rows of the support; V > 1 holds augmented views of the same images.
        weight: start of each head.
        orders: rows in the order of training, epoch by epoch; an epoch need not hold each row once.
        lam, beta: one number, or one per head.
        u: `u(s0)` of each row, 1 if absent.
        standardised: z-score the bias logits of each row before both losses (the released code does).
        picks: view at each place of `orders`; the first if absent.
        rates: what `lr` is multiplied by at each step; a cosine from 1 if absent.
        watched: steps, counted from 1, after which `watch` gets the slice of the heads in a group and their current
            weights (a live buffer).
    """
    heads, steps = len(weight), len(orders) * math.ceil(orders.shape[1] / batch_size)
    for name, value in (("lam", lam), ("beta", beta)):
        if isinstance(value, Sequence) and len(value) != heads:
            raise ValueError(f"{name} has {len(value)} values for {heads} heads")
    lams, betas = (torch.as_tensor(value, dtype=x.dtype).expand(heads)[:, None, None] for value in (lam, beta))
    rows, scores = x.flatten(0, 1), zero_shot.flatten(0, 1)
    k = betas * (x.new_ones(heads, len(rows), 1) if u is None else u.reshape(heads, -1, 1))
    places = orders if picks is None else orders + picks * len(y)
    batches = [batch for epoch in places for batch in epoch.split(batch_size)]
    scales = lr * (cosine(1.0, steps) if rates is None else rates)
    trained = Heads(torch.empty_like(weight), torch.empty(heads, steps, 3))

    def train(group: slice) -> None:
        columns = weight[group].mT.contiguous()  # [b D C], the layout in which small products are fastest
        columns.grad = torch.zeros_like(columns)
        optimiser = torch.optim.AdamW([columns], weight_decay=weight_decay, eps=eps, fused=True)
        for step, (batch, rate) in enumerate(zip(batches, scales.tolist(), strict=True)):
            seen = rows[batch].expand(len(columns), -1, -1)
            constants = scores[batch], k[group, batch], y[batch % len(y)], lams[group]
            trained.losses[group, step], gradient = _branches(seen @ columns, *constants, standardised)
            torch.bmm(seen.mT, gradient, out=columns.grad)
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
            if step + 1 in watched:
                watch(group, columns.mT)
        trained.weight[group] = columns.mT

    groups = min(heads, torch.get_num_threads())
    in_threads(train, [slice(*edges) for edges in pairwise(heads * i // groups for i in range(groups + 1))])
    return trained


def _branches(
    a: Float[Tensor, "b m C"], s0: Float[Tensor, "m C"], k: Tensor, y: Tensor, lam: Tensor, standardised: bool
) -> tuple[Float[Tensor, "b 3"], Float[Tensor, "b m C"]]:
    """Losses and their gradient by the bias logits a. With p = softmax(a), q = softmax(s0 + k a), k = beta u,

        d loss / d a = ((1 - lam) (p - Y) + lam k (q - Y)) / m

    and through the z-score z = (a - mean) / std, C - 1 in the variance, g = d loss / d z,

        d loss / d a = (g - mean(g) - z sum(g z) / (C - 1)) / std
    """
    if standardised:
        std, mean = torch.std_mean(a, dim=-1, keepdim=True)
        std.clamp_min_(1e-4)  # a row of equal logits (zero initialisation) has no direction to be scaled along
        a = (a - mean) / std
    log_p = torch.stack([a, s0 + k * a]).log_softmax(-1)
    truth = y.expand(2, len(a), -1)[..., None]
    auxiliary, fused = -log_p.gather(-1, truth)[..., 0].mean(-1)
    losses = torch.stack([torch.lerp(auxiliary, fused, lam[:, 0, 0]), fused, auxiliary], -1)
    p, q = log_p.exp_().scatter_add_(-1, truth, a.new_full((1, 1, 1, 1), -1.0).expand_as(truth))
    gradient = torch.lerp(p, k * q, lam) / len(y)
    if standardised:
        along = (gradient * a).sum(-1, keepdim=True) / (a.shape[-1] - 1)
        gradient = (gradient - gradient.mean(-1, keepdim=True) - along * a) / std
    return losses, gradient


def minimise(
    loss: Callable[[Int64[Tensor, " b"]], Float[Tensor, ""]],
    optimiser: torch.optim.Optimizer,
    orders: Int64[Tensor, "epochs n"],
    batch_size: int,
    rates: Float[Tensor, " T"],
    *,
    drop_last: bool = False,
) -> Float[Tensor, " T"]:
    """Minimise `loss(rows of the batch)` by autograd, with the learning rate of each step; the loss of each step.

    `drop_last` leaves out the smaller batch at the end of an epoch.
    """
    end = orders.shape[1] - orders.shape[1] % batch_size if drop_last else orders.shape[1]
    batches = [batch for epoch in orders for batch in epoch[:end].split(batch_size)]
    losses = torch.empty(len(rates))
    for step, (batch, rate) in enumerate(zip(batches, rates.tolist(), strict=True)):
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        value = loss(batch)
        value.backward()
        optimiser.step()
        losses[step] = value.detach()
    return losses
