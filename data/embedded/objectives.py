"""How an encoder learns without an evaluation image: augmentations, losses, one short loop, three trainings."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from open_clip import ClipLoss
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD  # open_clip's defaults, used for every embedded encoder


# ---- images ------------------------------------------------------------------------------------------------


class Augmentation(NamedTuple):
    """How far an image is changed: the smallest fraction of a side that a crop keeps, and whether half are mirrored."""

    crop: float
    flip: bool = False


LIGHT, FLIPPED = Augmentation(0.85), Augmentation(0.85, flip=True)


def normalise(images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Bytes to standardised colours, with MEAN and STD."""
    return _standardised(images.float() / 255)


def _standardised(x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)  # a third faster on a CPU


def augment(
    images: UInt8[Tensor, "n 3 h w"], how: Augmentation, generator: torch.Generator
) -> Float[Tensor, "n 3 h w"]:
    """A random view of every image, standardised: a crop, and a flip for half of them."""
    n, x = len(images), images.float() / 255
    scale = 1 - (1 - how.crop) * torch.rand(n, 2, generator=generator)
    shift = (1 - scale) * (2 * torch.rand(n, 2, generator=generator) - 1)
    if how.flip:
        scale[:, 0] *= torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = scale[:, 0], scale[:, 1], shift
    x = F.grid_sample(x, F.affine_grid(affine, list(x.shape), align_corners=False), align_corners=False)
    return _standardised(x)


# ---- objectives --------------------------------------------------------------------------------------------


def vicreg_loss(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m e"], weights: tuple[float, float, float] = (25.0, 25.0, 1.0)
) -> Float[Tensor, ""]:
    """Variance-invariance-covariance regularisation (Bardes et al. 2022, eq. 1 to 6).

        l m(a, b)^2 + u (v(a) + v(b)) + n (c(a) + c(b)),

    with the mean squared distance, the hinge 1 - sd of every dimension, and the squared off-diagonal covariances.

    Raises:
        ValueError: `a` and `b` differ in shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"the views differ: {tuple(a.shape)} and {tuple(b.shape)}")
    n, d = a.shape
    total = weights[0] * F.mse_loss(a, b)
    for x in (a - a.mean(0), b - b.mean(0)):
        total = total + weights[1] * F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean() / 2
        covariance = x.T @ x / (n - 1)
        total = total + weights[2] * (covariance - torch.diag(covariance.diagonal())).square().sum() / d
    return total


class VICReg(nn.Module):
    """`vicreg_loss` with a weaker pull of the two branches than the published 25, 25, 1.

    A dimension of deviation s whose branches correlate by r costs 2 l (1 - r) s^2 + u (1 - s), least at
    s = u / (4 l (1 - r)). With l = u all dimensions with r < 3/4 shrink, at the start thus all of them, and with s^4
    the covariances, so that they may all learn the same. With l = u / 5 none shrinks.
    """

    def forward(self, a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        return vicreg_loss(a, b, (5.0, 25.0, 1.0))


class InfoNCE(nn.Module):
    """Cross-entropy of t cos(a_i, b_j) over rows and over columns (van den Oord et al. 2018), t learned from 10."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        logits = self.scale.exp().clamp(max=100) * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
        same = torch.arange(len(logits))
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


# ---- the loop ----------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """Steps of `batch` images; AdamW with a linear warm-up over a tenth of the steps, then a cosine to zero."""

    steps: int
    batch: int = 256
    rate: float = 2e-3
    decay: float = 0.05


Watch = Callable[[list[float]], None]  # called after every step with the losses so far


def silent(curve: list[float]) -> None:
    """A watch that does nothing."""


def optimise(
    modules: Iterable[nn.Module], loss: Callable[[int], Float[Tensor, ""]], schedule: Schedule, watch: Watch = silent
) -> list[float]:
    """Values of `loss(step)` while it is minimised over the parameters of `modules`, which end in evaluation mode.

    Raises:
        ValueError: a loss that is not finite, naming the step.
    """
    trained = nn.ModuleList(modules).train()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98))
    warm, curve = max(1, schedule.steps // 10), []
    for step in range(schedule.steps):
        progress = max(0.0, (step - warm) / max(1, schedule.steps - warm))
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate * min((step + 1) / warm, (1 + math.cos(math.pi * progress)) / 2)
        value = loss(step)
        if not torch.isfinite(value):
            raise ValueError(f"the loss is {value.item()} at step {step} of {schedule.steps}")
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        curve.append(value.item())
        watch(curve)
    trained.eval()
    return curve


def batches(count: int, schedule: Schedule, generator: torch.Generator) -> Int64[Tensor, "steps batch"]:
    """Which images each step sees: whole shuffled passes, one after another."""
    needed = schedule.steps * schedule.batch
    passes = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
    return torch.cat(passes)[:needed].reshape(schedule.steps, schedule.batch)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a module from a seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().to(memory_format=torch.channels_last)


# ---- three trainings: the model is trained in place, the loss of every step comes back -------------------------


def train_clip(
    model: nn.Module,
    images: UInt8[Tensor, "n 3 48 48"],
    tokens: Int64[Tensor, "m length"],
    schedule: Schedule,
    seed: int,
    watch: Watch = silent,
) -> list[float]:
    """Contrastive training with open_clip's ClipLoss, in place; returns the loss of every step.

    Embeddings of tokens that no caption uses become zero: they would stay random, and zeros pack well.

    Raises:
        ValueError: `images` and `tokens` differ in number.
    """
    if len(images) != len(tokens):
        raise ValueError(f"{len(images)} images come with {len(tokens)} captions")
    generator = torch.Generator().manual_seed(seed)
    used = torch.zeros(model.vocab_size, dtype=torch.bool)
    used[tokens.unique()] = True
    with torch.no_grad():
        model.token_embedding.weight[~used] = 0
    rows, contrast = batches(len(images), schedule, generator), ClipLoss()

    def loss(step: int) -> Tensor:
        views = augment(images[rows[step]], LIGHT, generator)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return contrast(*model(views, tokens[rows[step]]))

    return optimise([model], loss, schedule, watch)


def train_pairs(
    model: nn.Module,
    pictures: UInt8[Tensor, "n 3 48 48"],
    drawings: UInt8[Tensor, "n 3 48 48"],
    objective: nn.Module,
    dim: int,
    schedule: Schedule,
    seed: int,
    watch: Watch = silent,
) -> list[float]:
    """Agreement of `dim` projections of a picture and of a drawing of the same thing, by `objective`.

    Each kind of image has a branch of its own, as VICReg allows (Bardes et al. 2022, section 4.3). Drawings are shrunk
    to half their side, at a quarter of the cost; their branch and the projectors are discarded.
    """
    generator, width = torch.Generator().manual_seed(seed), 256
    other = copy.deepcopy(model)
    projectors = seeded(
        lambda: nn.ModuleList(
            nn.Sequential(nn.Linear(model.num_features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, dim))
            for _ in range(2)
        ),
        seed,
    )
    rows = batches(len(pictures), schedule, generator)

    def loss(step: int) -> Tensor:
        picture, drawing = (augment(kind[rows[step]], FLIPPED, generator) for kind in (pictures, drawings))
        return objective(projectors[0](model(picture)), projectors[1](other(F.avg_pool2d(drawing, 2))))

    return optimise([model, projectors, other, objective], loss, schedule, watch)


def train_supervised(
    model: nn.Module,
    images: UInt8[Tensor, "n 3 48 48"],
    labels: Int64[Tensor, "m factors"],
    schedule: Schedule,
    seed: int,
    watch: Watch = silent,
) -> list[float]:
    """Cross-entropy, summed over one linear classifier for each column of `labels`; they are discarded.

    Raises:
        ValueError: `images` and `labels` differ in number, or a label is negative.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images come with {len(labels)} rows of labels")
    if labels.min() < 0:
        raise ValueError(f"labels start at 0, the smallest here is {labels.min().item()}")
    generator = torch.Generator().manual_seed(seed)
    sizes = (labels.max(0).values + 1).tolist()
    head = seeded(lambda: nn.Linear(model.num_features, sum(sizes)), seed)
    rows = batches(len(images), schedule, generator)

    def loss(step: int) -> Tensor:
        views = augment(images[rows[step]], FLIPPED, generator)
        logits = head(model(views)).split(sizes, 1)
        return sum(F.cross_entropy(part, y) for part, y in zip(logits, labels[rows[step]].T, strict=True))

    return optimise([model, head], loss, schedule, watch)
