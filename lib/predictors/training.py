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
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise, product

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.optim.adamw import adamw

CACHE_BYTES = 12 * 2**20  # what the heads trained together may take; half of a common third-level cache
BLOCK = 100  # steps prepared at a time


@dataclass(frozen=True)
class Heads:
    """B trained linear heads.

    Attributes:
        weight: one row per class.
        losses: per step the whole loss, the fused branch and the auxiliary branch (mean over the batch).
    """

    weight: Float[Tensor, "B C D"]
    losses: Float[Tensor, "B T 3"]


def in_threads(work: Callable, items: Sequence) -> list:
    """Return `work(item)` of each item; as many run side by side as torch may use threads, with one thread each."""
    threads = torch.get_num_threads()
    if min(threads, len(items)) < 2:
        return [work(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)


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


def train_heads(
    x: Float[Tensor, "V n D"],
    zero_shot: Float[Tensor, "V n C"],
    y: Int64[Tensor, " n"],
    weight: Float[Tensor, "B C D"],
    orders: Int64[Tensor, "B epochs m"],
    *,
    lr: float | Sequence[float] = 1e-3,
    weight_decay: float | Sequence[float] = 0.01,
    lam: float | Sequence[float] = 0.5,
    beta: float | Sequence[float] = 1.0,
    factor: Float[Tensor, "B V n"] | None = None,
    standardised: bool = False,
    batch_size: int = 8,
    eps: float = 1e-4,
    picks: Int64[Tensor, "B epochs m"] | None = None,
    rates: Float[Tensor, " T"] | None = None,
    watched: Container[int] = (),
    watch: Callable[[slice, Float[Tensor, "b C D"]], None] | None = None,
) -> Heads:
    """Train B heads side by side with AdamW; the last, smaller batch of an epoch is kept.

    A head and what AdamW remembers of it are read and written at every step, so the heads are trained in groups that
    fit into the cache, and groups run on as many threads as torch may use. The result depends on neither.

    Args:
        x: unit rows of the support; V > 1 holds augmented views of the same images.
        zero_shot: `s0` of the same rows.
        weight: where each head starts; left untouched.
        orders: the rows in the order each head sees them, epoch by epoch; an epoch need not show each row once.
        lr, weight_decay, lam, beta: one number, or one per head.
        factor: `u(s0)` of each row, 1 if absent.
        standardised: z-score the bias logits of each row before both losses (the released code does).
        picks: which view is shown at each place of `orders`; the first if absent.
        rates: what `lr` is multiplied by at each step; a cosine from 1 if absent.
        watched: the steps, counted from 1, after which `watch` is called with which heads of a group these are and
            their current weights (a live buffer).

    Returns:
        The weights after the last step and the losses of every step.

    Raises:
        ValueError: a per-head setting has another length than the number of heads.
    """
    heads, epochs, m = orders.shape
    lrs, decays, lams, betas = (
        _per_head(v, heads, name)
        for v, name in ((lr, "lr"), (weight_decay, "weight_decay"), (lam, "lam"), (beta, "beta"))
    )
    steps = epochs * math.ceil(m / batch_size)
    trained = Heads(torch.empty_like(weight), torch.empty(heads, steps, 3))
    rates = cosine(1.0, steps) if rates is None else rates
    rows, scores = x.flatten(0, 1), zero_shot.flatten(0, 1)

    def train(group: slice) -> None:
        strength = betas[group, None].expand(-1, len(rows))
        columns = weight[group].transpose(1, 2).contiguous()  # [b D C], the layout small products are fastest in
        _train_group(
            columns,
            trained.losses[group],
            (rows, scores, y, strength if factor is None else strength * factor[group].flatten(1)),
            orders[group],
            None if picks is None else picks[group],
            lams[group, None, None],
            (lrs[group], decays[group], eps),
            rates.tolist(),
            standardised,
            batch_size,
            lambda step: watch(group, columns.transpose(1, 2)) if step in watched else None,
        )
        trained.weight[group] = columns.transpose(1, 2)

    room = max(1, CACHE_BYTES // (16 * weight[0].numel()))  # a head's weight, gradient and two moments, 4 bytes each
    threads = torch.get_num_threads()
    groups = min(heads, threads * math.ceil(heads / room / threads))
    edges = [heads * i // groups for i in range(groups + 1)]
    in_threads(train, [slice(*pair) for pair in pairwise(edges)])
    return trained


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


def _train_group(weight, losses, data, orders, picks, lam, optimiser, rates, standardised, batch_size, watch):
    """Train a few heads, overwriting `weight [b D C]`, and write the losses of every step, `[b T 3]`.

    With a the bias logits, p = softmax(a), q = softmax(s0 + k a) and k = beta u, all per image of a batch of m,

        d loss / d a = ((1 - lam)(p - Y) + lam k (q - Y)) / m

    and through a z-score z = (a - mean) / std with C - 1 in the variance,

        d loss / d a = (g - mean(g) - z sum(g z) / (C - 1)) / std,  g = d loss / d z.

    A step is so short that every call counts: what does not depend on the weights is gathered for many steps at once.
    """
    (rows, scores, y, strengths), (heads, epochs, m) = data, orders.shape
    gradient = torch.zeros_like(weight)
    update = _adamw(weight, gradient, *optimiser)
    size = torch.full((m, 1), float(batch_size))  # of the batch that each place of an epoch is in
    size[m - m % batch_size :] = m % batch_size
    step = 0
    for epoch, block in product(range(epochs), range(0, m, BLOCK * batch_size)):
        places = slice(block, block + BLOCK * batch_size)
        image, first = orders[:, epoch, places], step
        row = image if picks is None else picks[:, epoch, places] * len(y) + image
        zero_shot, strength, truth = scores[row], strengths.gather(1, row)[..., None], y[image][..., None]
        share = torch.stack([(1 - lam).expand_as(strength), lam * strength]) / size[places]
        target = torch.zeros_like(zero_shot).scatter_(2, truth, share.sum(0))
        said = torch.empty(2, *zero_shot.shape)  # log-probabilities in each branch
        batches = [v.split(batch_size, -2) for v in (row[..., None], zero_shot, strength, share, target, said)]
        for shown, s0, k, weights, truths, log_p in zip(*batches, strict=True):
            seen = rows.index_select(0, shown.flatten()).view(heads, -1, rows.shape[1])
            bias = torch.bmm(seen, weight)
            if standardised:
                std, mean = torch.std_mean(bias, dim=-1, keepdim=True)
                std.clamp_min_(1e-4)  # a row of equal logits (zero initialisation) has no direction to be scaled along
                bias = (bias - mean) / std
            torch.log_softmax(torch.stack([bias, torch.addcmul(s0, k, bias)]), -1, out=log_p)
            slope = log_p.exp().mul_(weights).sum(0).sub_(truths)
            if standardised:
                along = (slope * bias).sum(-1, keepdim=True) / (bias.shape[-1] - 1)
                slope = (slope - slope.mean(-1, keepdim=True)).addcmul_(bias, along, value=-1).div_(std)
            torch.bmm(seen.transpose(1, 2), slope, out=gradient)
            update(rates[step])
            step += 1
            watch(step)
        parts = (said.gather(-1, truth.expand(2, *truth.shape)) / -size[places])[..., 0]
        padded = torch.nn.functional.pad(parts, (0, (step - first) * batch_size - parts.shape[-1]))
        auxiliary, fused = padded.view(2, heads, step - first, batch_size).sum(-1)
        losses[:, first:step] = torch.stack([torch.lerp(auxiliary, fused, lam[..., 0]), fused, auxiliary], dim=-1)


def _adamw(weight, gradient, lrs, decays, eps):
    """Return a function that takes one AdamW step with all rates scaled by what it is given, in torch's fused kernel.

    Neighbouring heads with the same settings are one parameter.
    """
    moments, parts = torch.zeros(2, *weight.shape), []
    for (lr, decay), members in groupby(range(len(weight)), key=lambda i: (lrs[i].item(), decays[i].item())):
        first, *_ = own = list(members)
        at = slice(first, first + len(own))
        state = [[v[at]] for v in (weight, gradient, *moments)]
        parts.append((lr, decay, state, [torch.zeros(())]))

    def step(scale: float) -> None:
        for lr, decay, state, steps in parts:
            adamw(
                *state,
                max_exp_avg_sqs=[],
                state_steps=steps,
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=lr * scale,
                weight_decay=decay,
                eps=eps,
                maximize=False,
            )

    return step


def _per_head(value: float | Sequence[float], heads: int, name: str) -> Float[Tensor, " B"]:
    found = torch.as_tensor(value, dtype=torch.float32)
    if found.ndim == 1 and len(found) != heads:
        raise ValueError(f"{name} has {len(found)} values for {heads} heads")
    return found.expand(heads)
