"""The embedded image world: textured shapes and digits, drawn from a seed.

An image shows one coloured, textured shape among clutter; a class is a texture and a shape ("striped star").
Evaluation sets come from `render` and `digits`, which `render.py` writes to files; training images of the encoders come
from `render_captioned`, `render_labelled`, `render_pairs` and `render_others`, whose seeds are of another family.
Every pixel follows from an explicit numpy Generator, so the same call gives the same bytes.
"""

from dataclasses import dataclass

import draw as drawing
import numpy as np
import others
import torch
from draw import CORRUPTIONS, IMAGE_SIZE
from jaxtyping import Int64, UInt8
from sklearn.datasets import load_digits
from torch import Tensor

SHAPES, NOVEL_SHAPES = drawing.SHAPES[:12], drawing.SHAPES[12:]
TEXTURES, NOVEL_TEXTURES = drawing.TEXTURES[:6], drawing.TEXTURES[6:]
COLOURS = tuple(drawing.PALETTE)
CLASSNAMES = tuple(f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES)
# A novel class shares at most one of its two factors with a known class.
NOVEL_CLASSNAMES = tuple(
    [f"{texture} {shape}" for texture in TEXTURES for shape in NOVEL_SHAPES]
    + [f"{texture} {shape}" for texture in NOVEL_TEXTURES for shape in SHAPES]
)
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "a drawing of a {}.", "a {}.")
DIGIT_TEMPLATES = ("the digit {}.", "a photo of the digit {}.", "the number {}.", "a photo of the number {}.")
DIGIT_CLASSNAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "val", "test")
IMAGES_PER_CLASS = {"train": 32, "val": 8, "test": 28}
VERSIONS = ("shapes", "shapes-v2", "shapes-sketch",
            *(f"shapes-corrupted-{severity}" for severity in range(1, 6)),
            "shapes-novel", "shapes-spurious")  # fmt: skip
SPURIOUS_AGREEMENT = 0.9  # fraction of train and val images whose background goes with their texture

_SPURIOUS_BACKGROUNDS = (COLOURS.index("green"), COLOURS.index("blue"))
_EVALUATION, _PRETRAINING = 1, 2  # the first word of every seed; no stream of one family is in the other


@dataclass(frozen=True)
class Rendered:
    """Images with their labels and factors.

    Attributes:
        images: RGB, 0..255, channels first.
        labels: index into `classnames`.
        attributes: one integer tensor [n] per factor. `shape`, `texture`, `colour` and `background` index
            the tuples of `draw`, whose first ones are those of this module; `group` (spurious
            only) is twice the half of TEXTURES plus which of the two backgrounds; `corruption` indexes
            CORRUPTIONS.
        classnames: the names of the labels.
    """

    images: UInt8[Tensor, "n 3 48 48"]
    labels: Int64[Tensor, " n"]
    attributes: dict[str, Int64[Tensor, " n"]]
    classnames: tuple[str, ...]


# ---- what an evaluation reads ---------------------------------------------------------------------


def _colours(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """An object colour and a different background colour for each image."""
    colour = rng.integers(len(COLOURS), size=n)
    return {"colour": colour, "background": (colour + rng.integers(1, len(COLOURS), n)) % len(COLOURS)}


def _spurious(rng: np.random.Generator, factors: dict[str, np.ndarray], place: np.ndarray, split: str) -> None:
    """Give each image one of two backgrounds; `place` is its position within its class, 0..1."""
    half = factors["texture"] // (len(TEXTURES) // 2)
    agrees = place < (0.5 if split == "test" else SPURIOUS_AGREEMENT)
    side = np.where(agrees, half, 1 - half)
    others = np.setdiff1d(np.arange(len(COLOURS)), _SPURIOUS_BACKGROUNDS)
    factors["colour"] = others[rng.integers(len(others), size=len(half))]
    factors["background"] = np.array(_SPURIOUS_BACKGROUNDS)[side]
    factors["group"] = 2 * half + side


def render(version: str, split: str) -> Rendered:
    """An evaluation set of the world, the same bytes at every call.

    Args:
        version: one of VERSIONS. `shapes-v2` is re-drawn (smaller, outlined, more turned and cluttered),
            `shapes-sketch` is ink on paper, `shapes-corrupted-s` is the `shapes` test set at severity s,
            `shapes-novel` shows NOVEL_CLASSNAMES, and in `shapes-spurious` the background goes with the
            half of TEXTURES in SPURIOUS_AGREEMENT of train and val, but in exactly half of test.
        split: train (32 images a class), val (8) or test (28; novel 42); shifted versions have test only.

    Raises:
        ValueError: an unknown version or split, or a split that the version lacks.
    """
    if version not in VERSIONS:
        raise ValueError(f"unknown version {version!r} of the world; there are {', '.join(VERSIONS)}")
    offered = SPLITS if version in ("shapes", "shapes-spurious") else ("test",)
    if split not in offered:
        raise ValueError(f"{version} has no split {split!r}; it has {', '.join(offered)}")
    base = "shapes" if version.startswith("shapes-corrupted") else version
    rng = np.random.default_rng([_EVALUATION, VERSIONS.index(base), SPLITS.index(split)])

    classnames = NOVEL_CLASSNAMES if version == "shapes-novel" else CLASSNAMES
    each = 42 if version == "shapes-novel" else IMAGES_PER_CLASS[split]
    order = rng.permutation(len(classnames) * each)
    labels, place = order // each, (order % each + 0.5) / each
    words = [name.split() for name in classnames]
    factors = {
        "shape": np.array([drawing.SHAPES.index(shape) for _, shape in words])[labels],
        "texture": np.array([drawing.TEXTURES.index(texture) for texture, _ in words])[labels],
        **_colours(rng, len(labels)),
    }
    if version == "shapes-spurious":
        _spurious(rng, factors, place, split)
    style = {"shapes-v2": drawing.REDRAWN, "shapes-sketch": drawing.SKETCH}.get(version, drawing.PHOTO)
    images = drawing.draw_shapes(rng, factors, style)
    if base != version:
        severity = int(version[-1])
        rng = np.random.default_rng([_EVALUATION, VERSIONS.index(version), SPLITS.index(split)])
        factors["corruption"] = rng.integers(len(CORRUPTIONS), size=len(labels))
        images = drawing.corrupt(rng, images, factors["corruption"], severity)
    return _rendered(images, labels, factors, classnames)


def digits(split: str) -> Rendered:
    """scikit-learn's 1,797 handwritten digits (8 x 8, 16 grey levels), enlarged linearly to 48 x 48 RGB.

    The division is fixed: of every class, in an order drawn once, 60 images are train, 20 val and the rest
    test (997 in all).

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"digits has no split {split!r}; it has {', '.join(SPLITS)}")
    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    rng = np.random.default_rng([_EVALUATION, 1797])
    member = np.full(len(labels), SPLITS.index("test"))
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        member[rows[:60]], member[rows[60:80]] = SPLITS.index("train"), SPLITS.index("val")
    rows = member == SPLITS.index(split)
    coarse = torch.from_numpy(bunch.images[rows][:, None] / 16.0)
    fine = torch.nn.functional.interpolate(coarse, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    images = (fine * 255 + 0.5).to(torch.uint8).repeat(1, 3, 1, 1).numpy()
    return _rendered(images, labels[rows], {}, DIGIT_CLASSNAMES)


def _tensors(factors: dict[str, np.ndarray]) -> dict[str, Int64[Tensor, " n"]]:
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in factors.items()}


def _rendered(
    images: np.ndarray, labels: np.ndarray, factors: dict[str, np.ndarray], classnames: tuple[str, ...]
) -> Rendered:
    labels = torch.from_numpy(labels.astype(np.int64))
    return Rendered(torch.from_numpy(images), labels, _tensors(factors), classnames)


# ---- what an encoder is trained on ----------------------------------------------------------------

DIGIT_RATE, SKETCH_RATE = 0.15, 0.05
CAPTION_RATES = {"colour": 0.4, "texture": 0.2, "background": 0.15}  # how often a caption names each factor
_PURPOSES = ("captioned", "unlabelled", "labelled", "pairs")  # places are seeds; the second is no longer drawn


def _check_stream(n: int, seed: int) -> None:
    if n < 1 or seed < 0:
        raise ValueError(f"a stream has at least 1 image and a seed of 0 or more, not n={n}, seed={seed}")


def _stream(n: int, seed: int, purpose: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images and factors of the pretraining stream; -1 where a factor does not apply."""
    _check_stream(n, seed)
    rng = np.random.default_rng([_PRETRAINING, _PURPOSES.index(purpose), seed])
    which = rng.random(n)
    digit, sketch = which < DIGIT_RATE, which > 1 - SKETCH_RATE
    factors = {
        "shape": np.where(digit, -1, rng.integers(len(SHAPES), size=n)),
        "texture": np.where(digit, -1, rng.integers(len(TEXTURES), size=n)),
        **_colours(rng, n),
        "digit": np.where(digit, rng.integers(10, size=n), -1),
        "sketch": sketch.astype(np.int64),
    }
    return _drawn(rng, factors), factors


def _drawn(rng: np.random.Generator, factors: dict[str, np.ndarray]) -> np.ndarray:
    digit, sketch = factors["digit"] >= 0, factors["sketch"] == 1
    images = np.empty((len(digit), 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for rows, style in ((~digit & ~sketch, drawing.PHOTO), (sketch, drawing.SKETCH), (digit, None)):
        some = {name: values[rows] for name, values in factors.items()}
        images[rows] = drawing.draw_shapes(rng, some, style) if style else drawing.draw_digits(rng, some)
    return images


def render_captioned(n: int, seed: int) -> tuple[UInt8[Tensor, "n 3 48 48"], list[str]]:
    """Images with captions that say little, as captions on the web do.

    A caption always names the shape, and colour, texture and background at CAPTION_RATES; DIGIT_RATE of
    the images are printed digits, SKETCH_RATE are sketches.

    Raises:
        ValueError: `n` below 1 or `seed` below 0.
    """
    images, factors = _stream(n, seed, "captioned")
    rng = np.random.default_rng([_PRETRAINING, 9, seed])
    names = {name: rng.random(n) < rate for name, rate in CAPTION_RATES.items()}
    picks = rng.integers(len(TEMPLATES), size=n)
    captions = []
    for i in range(n):
        coloured = names["colour"][i] and not factors["sketch"][i]
        colour = f"{COLOURS[factors['colour'][i]]} " if coloured else ""
        if factors["digit"][i] >= 0:
            template = DIGIT_TEMPLATES[picks[i] % len(DIGIT_TEMPLATES)]
            captions.append(template.format(colour + DIGIT_CLASSNAMES[factors["digit"][i]]))
            continue
        texture = f"{TEXTURES[factors['texture'][i]]} " if names["texture"][i] else ""
        template = "a sketch of a {}." if factors["sketch"][i] else TEMPLATES[picks[i]]
        thing = colour + texture + SHAPES[factors["shape"][i]]
        if names["background"][i] and not factors["sketch"][i]:
            thing += f" on a {COLOURS[factors['background'][i]]} background"
        captions.append(template.format(thing))
    return torch.from_numpy(images), captions


def render_pairs(n: int, seed: int) -> tuple[UInt8[Tensor, "n 3 48 48"], UInt8[Tensor, "n 3 48 48"]]:
    """A picture and a line drawing of each thing, in poses of their own, without captions.

    The two share shape and texture (or the digit, which is printed twice), not colour, place or background.

    Raises:
        ValueError: `n` below 1 or `seed` below 0.
    """
    pictures, factors = _stream(n, seed, "pairs")
    rng = np.random.default_rng([_PRETRAINING, len(_PURPOSES), seed])
    drawings = _drawn(rng, factors | {"sketch": np.ones(n, np.int64)})
    return torch.from_numpy(pictures), torch.from_numpy(drawings)


def render_labelled(n: int, seed: int) -> tuple[UInt8[Tensor, "n 3 48 48"], dict[str, Int64[Tensor, " n"]]]:
    """Images with their factors (-1 where one does not apply), for supervised pretraining.

    Raises:
        ValueError: `n` below 1 or `seed` below 0.
    """
    images, factors = _stream(n, seed, "labelled")
    return torch.from_numpy(images), _tensors(factors)


def render_others(n: int, seed: int) -> tuple[UInt8[Tensor, "n 3 48 48"], Int64[Tensor, " n"]]:
    """Images of shapes and textures that no evaluated class has, with their 128 classes: a texture and a shape each.

    Raises:
        ValueError: `n` below 1 or `seed` below 0.
    """
    _check_stream(n, seed)
    rng = np.random.default_rng([_PRETRAINING, len(_PURPOSES) + 1, seed])  # one more is the drawings of pairs
    factors = {
        "shape": rng.integers(len(others.SHAPES), size=n),
        "texture": rng.integers(len(others.TEXTURES), size=n),
        **_colours(rng, n),
    }
    images = drawing.draw_shapes(rng, factors, drawing.PHOTO, others.KINDS)
    labels = factors["texture"] * len(others.SHAPES) + factors["shape"]
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
