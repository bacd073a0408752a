"""Make the embedded encoders: recipes, training, and weights on disk; notebook 90 calls these.

Every encoder is trained on the pretraining streams of `world` alone and sees no evaluation image. The
architectures are open_clip's and timm's own, so that the weights load through those libraries.
"""

import copy
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import open_clip
import timm
import torch
import world
from jaxtyping import Float, Int64, UInt8
from objectives import (
    FLIPPED,
    LIGHT,
    MEAN,
    STD,
    MaskedAutoencoder,
    Schedule,
    augment,
    batches,
    normalise,
    optimise,
    seeded,
    vicreg_loss,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

CLIP_NAME = "embedded-clip"  # the name of the open_clip configuration
CLIP_CONFIG = Path(__file__).resolve().parent / f"{CLIP_NAME}.json"
VIT = {
    "img_size": 48,
    "patch_size": 6,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "global_pool": "avg",
    "fc_norm": False,
}


class Recipe(NamedTuple):
    """How an embedded encoder is made: its name in timm (or open_clip) and settings, what it is trained for and on."""

    architecture: str
    settings: dict[str, int | bool | str]
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
    "vicreg": Recipe(
        "test_byobnet",
        {},
        "VICReg between pictures and line drawings of the same things",
        Schedule(900, rate=3e-3),
        40_000,
    ),
    "mae": Recipe("vit_tiny_patch16_224", VIT, "masked autoencoding of unlabelled images", Schedule(500), 40_000),
    "supervised": Recipe("test_byobnet", {}, "cross-entropy on the texture", Schedule(400), 40_000),
    "supervised-colour": Recipe("test_byobnet", {}, "cross-entropy on both colours", Schedule(200), 40_000),
    "random": Recipe("test_byobnet", {}, "none: random weights", Schedule(0), 1),
}


# ---- encoders ----------------------------------------------------------------------------------------------


def clip_model(seed: int) -> nn.Module:
    """The untrained two-tower model that CLIP_CONFIG describes, in open_clip's own classes."""
    open_clip.add_model_config(CLIP_CONFIG)
    return seeded(lambda: open_clip.create_model(CLIP_NAME, pretrained=None), seed)


def encoder(name: str, seed: int) -> nn.Module:
    """An untrained auxiliary encoder of RECIPES, in timm's own classes and without a classifier.

    Raises:
        ValueError: a name that is not an auxiliary encoder's.
    """
    names = [each for each in RECIPES if each != "clip"]
    if name not in names:
        raise ValueError(f"unknown auxiliary encoder {name!r}; there are {', '.join(names)}")
    recipe = RECIPES[name]
    return seeded(lambda: timm.create_model(recipe.architecture, num_classes=0, **recipe.settings), seed)


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
    rows, contrast = batches(len(images), schedule, generator), open_clip.ClipLoss()

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
    pictures: UInt8[Tensor, "n 3 48 48"],
    drawings: UInt8[Tensor, "n 3 48 48"],
    schedule: Schedule,
    seed: int,
    show: bool = False,
) -> list[float]:
    """VICReg between a picture and a drawing of the same thing; the branch for drawings and the projectors go.

    Each kind of image has a branch of its own, as VICReg allows (Bardes et al. 2022, section 4.3).
    """
    generator, width = torch.Generator().manual_seed(seed), 256
    other = copy.deepcopy(model)
    projectors = seeded(
        lambda: nn.ModuleList(
            nn.Sequential(
                nn.Linear(model.num_features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
            )
            for _ in range(2)
        ),
        seed,
    )
    rows = batches(len(pictures), schedule, generator)

    def loss(step: int) -> Tensor:
        views = [augment(kind[rows[step]], FLIPPED, generator) for kind in (pictures, drawings)]
        return vicreg_loss(projectors[0](model(views[0])), projectors[1](other(views[1])))

    for module in (model, other):
        module.train()
    curve = optimise([model, other, projectors], loss, schedule, show)
    model.eval()
    return curve


def train_mae(
    model: nn.Module, images: UInt8[Tensor, "n 3 48 48"], schedule: Schedule, seed: int, show: bool = False
) -> list[float]:
    """Masked autoencoding; the decoder is thrown away."""
    generator = torch.Generator().manual_seed(seed)
    autoencoder = seeded(lambda: MaskedAutoencoder(model), seed)
    rows = batches(len(images), schedule, generator)

    def loss(step: int) -> Tensor:
        return autoencoder.loss(augment(images[rows[step]], FLIPPED, generator), generator)

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
    head = seeded(lambda: nn.Linear(model.num_features, sum(sizes)), seed)
    rows = batches(len(images), schedule, generator)

    def loss(step: int) -> Tensor:
        views = augment(images[rows[step]], FLIPPED, generator)
        logits = head(model(views)).split(sizes, 1)
        return sum(F.cross_entropy(part, y) for part, y in zip(logits, labels[rows[step]].T, strict=True))

    model.train()
    curve = optimise([model, head], loss, schedule, show)
    model.eval()
    return curve


def select(names: str) -> tuple[str, ...]:
    """Encoders named in one string, joined by +; `all` is every recipe.

    Raises:
        ValueError: a name without a recipe.
    """
    chosen = tuple(RECIPES) if names == "all" else tuple(names.split("+"))
    unknown = [name for name in chosen if name not in RECIPES]
    if unknown:
        raise ValueError(f"no recipe for {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    return chosen


def plan(name: str, steps: int = 0, images: int = 0) -> Recipe:
    """The recipe of an encoder, with another number of steps or images where one is given.

    Raises:
        ValueError: a negative number, or images for less than one batch of two.
    """
    if steps < 0 or images < 0 or images == 1:
        raise ValueError(f"{name} cannot be trained for {steps} steps on {images} images")
    recipe = RECIPES[name]
    if name == "random":
        return recipe
    steps = steps or recipe.schedule.steps
    images = images or min(recipe.images, steps * recipe.schedule.batch)  # what is never drawn is not rendered
    schedule = recipe.schedule._replace(steps=steps, batch=min(recipe.schedule.batch, images))
    return recipe._replace(schedule=schedule, images=images)


def train(name: str, recipe: Recipe, seed: int, show: bool = False) -> Trained:
    """Build an encoder, render its own images, train it by its own objective."""
    started, schedule, images = time.monotonic(), recipe.schedule, recipe.images
    model = clip_model(seed) if name == "clip" else encoder(name, seed)
    if name == "random":
        curve = []
    elif name == "clip":
        curve = train_clip(model, *world.render_captioned(images, seed), schedule, seed, show)
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


def index_entry(name: str, trained: Trained, path: Path, sha256: str, recipe: Recipe, seed: int) -> dict[str, object]:
    """What index.json says of an encoder: how to load it, and how it came about."""
    clip, schedule = name == "clip", recipe.schedule
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
        "images": recipe.images,
        "steps": schedule.steps,
        "batch": schedule.batch,
        "learning_rate": schedule.rate,
        "seed": seed,
        "seconds": round(trained.seconds),
        "loss": ends(trained.curve),
    }


def ends(curve: Sequence[float]) -> tuple[float, float] | None:
    """Mean loss over the first and over the last twentieth of the steps; None without steps."""
    part = max(1, len(curve) // 20)
    return (sum(curve[:part]) / part, sum(curve[-part:]) / part) if curve else None


def shipped() -> dict[str, dict[str, object]]:
    """The index of the weights that come with the workbook; empty where there are none."""
    path = CLIP_CONFIG.with_name("index.json")
    return json.loads(path.read_text()) if path.exists() else {}


def write_index(entries: dict[str, dict[str, object]], folder: Path) -> None:
    """Write `folder`/index.json in one step; encoders that are there and were not trained again stay in it."""
    path, temporary = folder / "index.json", folder / "index.json.part"
    known = json.loads(path.read_text()) if path.exists() else {}
    merged = {name: (known | entries)[name] for name in RECIPES if name in known | entries}
    temporary.write_text(json.dumps(merged, indent=2) + "\n")
    temporary.replace(path)


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


def caption_shares(captions: Sequence[str]) -> dict[str, float]:
    """Which share of captions is about a digit or a sketch, and which share of the others names each factor."""
    words = [caption.strip(".").split() for caption in captions]
    things = [w for w in words if not set(w) & set(world.DIGIT_CLASSNAMES)]
    drawn = [w for w in things if "sketch" not in w]
    ahead = [w[: w.index("on")] if "on" in w else w for w in drawn]  # what comes before the background
    named = {
        "shape": [w[-1] in world.SHAPES for w in ahead],
        "texture": [not set(w).isdisjoint(world.TEXTURES) for w in ahead],
        "colour": [not set(w).isdisjoint(world.COLOURS) for w in ahead],
        "background": ["background" in w for w in drawn],
    }
    shares = {"digit": 1 - len(things) / len(words), "sketch": (len(things) - len(drawn)) / len(words)}
    return shares | {name: sum(hits) / max(1, len(hits)) for name, hits in named.items()}


def right_about(answers: Int64[Tensor, " n"], drawn: world.Rendered) -> dict[str, float]:
    """Share of answers (indices of CLASSNAMES) that have the class, its shape, its texture right."""
    texture, shape = answers // len(world.SHAPES), answers % len(world.SHAPES)
    hits = {
        "class": answers == drawn.labels,
        "shape": shape == drawn.attributes["shape"],
        "texture": texture == drawn.attributes["texture"],
    }
    return {name: hit.float().mean().item() for name, hit in hits.items()}
