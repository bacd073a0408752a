"""Train the embedded encoders: objectives, augmentations, and one short loop; notebook 90 calls these.

Every encoder is trained on the pretraining streams of `world` alone and sees no evaluation image. The
architectures are open_clip's and timm's own, so that the weights load through those libraries.
"""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import open_clip
import timm
import torch
from jaxtyping import Float, Int64, UInt8
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lib import world

CLIP_NAME = "embedded-clip"  # the name of the open_clip configuration, and of its file
MEAN, STD = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD  # open_clip's defaults, used for every encoder here
VIT = {"img_size": 48, "patch_size": 6, "embed_dim": 128, "depth": 4, "num_heads": 4}


class Schedule(NamedTuple):
    """Steps of `batch` images; AdamW with a linear warm-up over a tenth of the steps, then a cosine to zero."""

    steps: int
    batch: int = 256
    rate: float = 2e-3
    decay: float = 0.05


class Recipe(NamedTuple):
    """How an embedded encoder is made: its name in timm (or open_clip) and settings, what it is trained for and on."""

    architecture: str
    settings: dict[str, int]
    objective: str
    schedule: Schedule
    images: int


class Trained(NamedTuple):
    """A trained encoder in evaluation mode, the loss of every step, and the seconds it all took."""

    model: nn.Module
    curve: list[float]
    seconds: float


RECIPES = {
    "clip": Recipe(CLIP_NAME, {}, "contrastive loss on captioned images", Schedule(2000, rate=3e-3), 60_000),
    "vicreg": Recipe("test_byobnet", {}, "VICReg on pairs of pictures of the same thing", Schedule(800), 40_000),
    "mae": Recipe("vit_tiny_patch16_224", VIT, "masked autoencoding of unlabelled images", Schedule(1000), 40_000),
    "supervised": Recipe("test_byobnet", {}, "cross-entropy on the texture", Schedule(400), 40_000),
    "supervised-colour": Recipe("test_byobnet", {}, "cross-entropy on both colours", Schedule(200), 40_000),
    "random": Recipe("test_byobnet", {}, "none: random weights", Schedule(0), 1),
}


# ---- images ------------------------------------------------------------------------------------------------


class Augmentation(NamedTuple):
    """How far an image is changed: `crop` is the smallest share of the side that stays, the rest are strengths."""

    crop: float = 0.85
    flip: bool = False
    colour: float = 0.0
    noise: float = 0.0


LIGHT = Augmentation()
STRONG = Augmentation(crop=0.8, flip=True, colour=0.3, noise=0.02)


def normalise(images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Bytes to standardised colours, with MEAN and STD."""
    return _standardised(images.float() / 255)


def _standardised(x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)  # a third faster on a CPU


def augment(
    images: UInt8[Tensor, "n 3 h w"], how: Augmentation, generator: torch.Generator
) -> Float[Tensor, "n 3 h w"]:
    """A random view of every image, standardised: crop, flip, channel mixing with brightness and contrast, noise."""
    n, x = len(images), images.float() / 255
    scale = 1 - (1 - how.crop) * torch.rand(n, 2, generator=generator)
    shift = (1 - scale) * (2 * torch.rand(n, 2, generator=generator) - 1)
    if how.flip:
        scale[:, 0] *= torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = scale[:, 0], scale[:, 1], shift
    x = F.grid_sample(x, F.affine_grid(affine, list(x.shape), align_corners=False), align_corners=False)
    if how.colour:
        mixing = torch.eye(3) + how.colour * torch.randn(n, 3, 3, generator=generator)
        x = torch.einsum("nij,njhw->nihw", mixing, x - 0.5)
        x = x + 0.5 + how.colour / 2 * torch.randn(n, 3, 1, 1, generator=generator)
        x = x.clamp(0, 1)
    if how.noise:
        x = x + how.noise * torch.randn(x.shape, generator=generator)
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


def patches(images: Float[Tensor, "n 3 h w"], size: int) -> Float[Tensor, "n tokens pixels"]:
    """Cut images into squares of `size` pixels, each standardised by its own mean and deviation.

    Raises:
        ValueError: `size` does not divide the sides of the images.
    """
    height, width = images.shape[2:]
    if height % size or width % size:
        raise ValueError(f"patches of {size} pixels do not tile images of {height} x {width}")
    cut = F.unfold(images, size, stride=size).transpose(1, 2)
    return (cut - cut.mean(-1, keepdim=True)) / (cut.var(-1, keepdim=True) + 1e-4).sqrt()


class MaskedAutoencoder(nn.Module):
    """A light decoder on timm's vision transformer (He et al. 2022): hide patches, predict their pixels."""

    def __init__(self, encoder: nn.Module, width: int = 64, hidden: float = 0.7):
        super().__init__()
        self.encoder, self.hidden = encoder, hidden
        tokens, patch = encoder.patch_embed.num_patches, encoder.patch_embed.patch_size[0]
        self.enter = nn.Linear(encoder.embed_dim, width)
        self.missing = nn.Parameter(torch.zeros(width))
        self.places = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.decoder = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * patch**2))

    def loss(self, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Float[Tensor, ""]:
        """Mean squared error over the hidden patches."""
        encoder, n = self.encoder, len(images)
        tokens = encoder.patch_embed(images) + encoder.pos_embed[:, encoder.num_prefix_tokens :]
        count = tokens.shape[1]
        kept = count - round(self.hidden * count)
        order = torch.rand(n, count, generator=generator).argsort(1)
        rows = torch.arange(n)[:, None]
        prefix = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(n, -1, -1)
        seen = encoder.norm(encoder.blocks(torch.cat([prefix, tokens[rows, order[:, :kept]]], 1)))[:, 1:]
        full = self.missing.expand(n, count, -1).clone()
        full[rows, order[:, :kept]] = self.enter(seen)
        guess = self.leave(self.decoder(full + self.places))
        target = patches(images, encoder.patch_embed.patch_size[0])
        away = order[:, kept:]
        return F.mse_loss(guess[rows, away], target[rows, away])


# ---- the loop ----------------------------------------------------------------------------------------------


def optimise(
    modules: Iterable[nn.Module], loss: Callable[[int], Float[Tensor, ""]], schedule: Schedule, show: bool = False
) -> list[float]:
    """Minimise `loss(step)` over the parameters of `modules`; the curve of its values comes back.

    Raises:
        ValueError: a loss that is not finite, naming the step.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
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
        if show and (step % 50 == 0 or step == schedule.steps - 1):
            print(f"step {step:5d}  loss {sum(curve[-50:]) / len(curve[-50:]):.3f}", flush=True)
    return curve


def _rows(count: int, schedule: Schedule, generator: torch.Generator) -> Int64[Tensor, "steps batch"]:
    """Which images each step sees: whole shuffled passes, one after another."""
    needed = schedule.steps * schedule.batch
    passes = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
    return torch.cat(passes)[:needed].reshape(schedule.steps, schedule.batch)


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a module from a seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().to(memory_format=torch.channels_last)


# ---- encoders ----------------------------------------------------------------------------------------------


def clip_model(folder: Path, seed: int) -> nn.Module:
    """The untrained two-tower model that `folder`/embedded-clip.json describes, in open_clip's own classes."""
    open_clip.add_model_config(folder)
    return _seeded(lambda: open_clip.create_model(CLIP_NAME, pretrained=None), seed)


def encoder(name: str, seed: int) -> nn.Module:
    """An untrained auxiliary encoder of RECIPES, in timm's own classes and without a classifier.

    Raises:
        ValueError: a name that is not an auxiliary encoder's.
    """
    names = [each for each in RECIPES if each != "clip"]
    if name not in names:
        raise ValueError(f"unknown auxiliary encoder {name!r}; there are {', '.join(names)}")
    recipe = RECIPES[name]
    return _seeded(lambda: timm.create_model(recipe.architecture, num_classes=0, **recipe.settings), seed)


def train_clip(
    model: nn.Module,
    images: UInt8[Tensor, "n 3 48 48"],
    captions: list[str],
    schedule: Schedule,
    seed: int,
    show: bool = False,
) -> list[float]:
    """Contrastive training with open_clip's tokenizer and ClipLoss; the model is trained in place.

    Embeddings of tokens that no caption uses become zero: they would stay random, and zeros pack well.

    Raises:
        ValueError: `images` and `captions` differ in number.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images come with {len(captions)} captions")
    generator = torch.Generator().manual_seed(seed)
    tokens = open_clip.get_tokenizer(CLIP_NAME)(captions)
    used = torch.zeros(model.vocab_size, dtype=torch.bool)
    used[tokens.unique()] = True
    with torch.no_grad():
        model.token_embedding.weight[~used] = 0
    rows, contrast = _rows(len(images), schedule, generator), open_clip.ClipLoss()

    def loss(step: int) -> Tensor:
        views = augment(images[rows[step]], LIGHT, generator)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return contrast(*model(views, tokens[rows[step]]))

    model.train()
    curve = optimise([model], loss, schedule, show)
    model.eval()
    return curve


def train_vicreg(
    model: nn.Module,
    first: UInt8[Tensor, "n 3 48 48"],
    second: UInt8[Tensor, "n 3 48 48"],
    schedule: Schedule,
    seed: int,
    show: bool = False,
) -> list[float]:
    """VICReg between augmented pictures of the same thing; the projector is thrown away."""
    generator, width = torch.Generator().manual_seed(seed), 256
    projector = _seeded(
        lambda: nn.Sequential(
            nn.Linear(model.num_features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
        ),
        seed,
    )
    rows = _rows(len(first), schedule, generator)

    def loss(step: int) -> Tensor:
        both = torch.cat([augment(views[rows[step]], STRONG, generator) for views in (first, second)])
        return vicreg_loss(*projector(model(both)).chunk(2))

    model.train()
    curve = optimise([model, projector], loss, schedule, show)
    model.eval()
    return curve


def train_mae(
    model: nn.Module, images: UInt8[Tensor, "n 3 48 48"], schedule: Schedule, seed: int, show: bool = False
) -> list[float]:
    """Masked autoencoding; the decoder is thrown away."""
    generator = torch.Generator().manual_seed(seed)
    autoencoder = _seeded(lambda: MaskedAutoencoder(model), seed)
    rows = _rows(len(images), schedule, generator)

    def loss(step: int) -> Tensor:
        return autoencoder.loss(augment(images[rows[step]], Augmentation(crop=0.7, flip=True), generator), generator)

    model.train()
    curve = optimise([autoencoder], loss, schedule, show)
    model.eval()
    return curve


def train_supervised(
    model: nn.Module,
    images: UInt8[Tensor, "n 3 48 48"],
    labels: Int64[Tensor, "m factors"],
    schedule: Schedule,
    seed: int,
    show: bool = False,
) -> list[float]:
    """Cross-entropy, summed over one linear classifier for each column of `labels`; they are thrown away.

    Raises:
        ValueError: `images` and `labels` differ in number, or a label is negative.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images come with {len(labels)} rows of labels")
    if labels.min() < 0:
        raise ValueError(f"labels start at 0, the smallest here is {labels.min().item()}")
    generator = torch.Generator().manual_seed(seed)
    sizes = (labels.max(0).values + 1).tolist()
    head = _seeded(lambda: nn.Linear(model.num_features, sum(sizes)), seed)
    rows = _rows(len(images), schedule, generator)

    def loss(step: int) -> Tensor:
        views = augment(images[rows[step]], LIGHT._replace(flip=True), generator)
        logits = head(model(views)).split(sizes, 1)
        return sum(F.cross_entropy(part, y) for part, y in zip(logits, labels[rows[step]].T, strict=True))

    model.train()
    curve = optimise([model, head], loss, schedule, show)
    model.eval()
    return curve


def train(name: str, folder: Path, schedule: Schedule, images: int, seed: int, show: bool = False) -> Trained:
    """Build an encoder of RECIPES, render its own images, train it.

    Args:
        folder: where the open_clip configuration lies.
        images: how many images are rendered; a step draws from them without repetition within a pass.

    Raises:
        ValueError: an unknown name, or numbers below 1.
    """
    if images < 1 or schedule.steps < 0 or schedule.batch < 2:
        raise ValueError(f"nothing to train with: {images} images, {schedule.steps} steps of {schedule.batch}")
    started = time.monotonic()
    if name == "clip":
        model = clip_model(folder, seed)
        curve = train_clip(model, *world.render_captioned(images, seed), schedule, seed, show)
    else:
        model = encoder(name, seed)
        if name == "random":
            curve = []
        elif name == "vicreg":
            curve = train_vicreg(model, *world.render_pairs(images, seed), schedule, seed, show)
        elif name == "mae":
            curve = train_mae(model, world.render_unlabelled(images, seed), schedule, seed, show)
        else:
            curve = train_supervised(model, *labelled(name, images, seed), schedule, seed, show)
    return Trained(model.eval(), curve, time.monotonic() - started)


def labelled(name: str, images: int, seed: int) -> tuple[UInt8[Tensor, "n 3 48 48"], Int64[Tensor, "n factors"]]:
    """The images and label columns of a supervised encoder: texture alone, or object and background colour."""
    drawn, factors = world.render_labelled(images, seed)
    columns = ["texture"] if name == "supervised" else ["colour", "background"]
    rows = (factors["texture"] >= 0) & (factors["sketch"] == 0)  # digits have no texture, sketches no colour
    return drawn[rows], torch.stack([factors[column][rows] for column in columns], 1)


# ---- on disk ---------------------------------------------------------------------------------------------


def save_encoder(model: nn.Module, path: Path) -> str:
    """Write the weights and return their sha256: matrices and kernels as float16, vectors and counts as they are."""
    state = {name: value.half() if value.ndim > 1 and value.is_floating_point() else value
             for name, value in model.state_dict().items()}  # fmt: skip
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def restored(model: nn.Module, path: Path) -> nn.Module:
    """A copy of `model` with the weights of `path`, ready to encode: what a reader of the file gets."""
    model = copy.deepcopy(model)
    model.load_state_dict(load_file(path))
    return model.eval()


def index_entry(
    name: str, trained: Trained, path: Path, sha256: str, schedule: Schedule, images: int, seed: int
) -> dict[str, object]:
    """What index.json says of an encoder: how to load it, and how it came about."""
    recipe, clip = RECIPES[name], name == "clip"
    return {
        "file": path.name,
        "sha256": sha256,
        "bytes": path.stat().st_size,
        "kind": "open_clip" if clip else "timm",
        "architecture": recipe.architecture,
        "settings": recipe.settings,
        "image_size": world.IMAGE_SIZE,
        "mean": MEAN,
        "std": STD,
        "feature_dim": trained.model.text_projection.shape[1] if clip else trained.model.num_features,
        "objective": recipe.objective,
        "images": images,
        "steps": schedule.steps,
        "batch": schedule.batch,
        "learning_rate": schedule.rate,
        "seed": seed,
        "seconds": round(trained.seconds),
        "final_loss": round(sum(trained.curve[-50:]) / len(trained.curve[-50:]), 4) if trained.curve else None,
    }


def write_index(entries: dict[str, dict[str, object]], folder: Path) -> None:
    """Write `folder`/index.json, in one step so that no reader meets half of it."""
    temporary = folder / "index.json.part"
    temporary.write_text(json.dumps(entries, indent=2) + "\n")
    temporary.replace(folder / "index.json")


@torch.inference_mode()
def encode(model: nn.Module, images: UInt8[Tensor, "n 3 48 48"], batch: int = 256) -> Float[Tensor, "n d"]:
    """Image features in the encoder's own scale."""
    look = getattr(model, "encode_image", model)
    return torch.cat([look(normalise(part)) for part in images.split(batch)]).float()


@torch.inference_mode()
def text_classifier(
    model: nn.Module, classnames: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "classes d"]:
    """Text features of the classes: the normalised mean over the templates of normalised features."""
    tokenizer = open_clip.get_tokenizer(CLIP_NAME)
    parts = [model.encode_text(tokenizer([t.format(name) for name in classnames]), normalize=True) for t in templates]
    return F.normalize(torch.stack(parts).mean(0), dim=1)
