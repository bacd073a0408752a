"""Draw the embedded world: scenes of textured shapes and printed digits, and their corruptions.

A scene is factors (numpy arrays of indices: shape, texture, colour, background, digit), a `Style` and a numpy
Generator; out come uint8 images [n, 3, 48, 48]. `world` decides which scenes there are.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

IMAGE_SIZE = 48
PALETTE = {
    "red": (0.85, 0.13, 0.13), "orange": (0.96, 0.55, 0.10), "yellow": (0.95, 0.88, 0.15),
    "green": (0.15, 0.65, 0.22), "blue": (0.15, 0.30, 0.85), "purple": (0.52, 0.18, 0.70),
    "pink": (0.97, 0.55, 0.75), "brown": (0.48, 0.29, 0.13), "white": (0.96, 0.96, 0.96),
    "gray": (0.50, 0.50, 0.50),
}  # fmt: skip
CORRUPTIONS = ("noise", "blur", "contrast", "pixels", "occlusion")

_RGB = np.array(list(PALETTE.values()), np.float32)
CHUNK = 192  # images drawn at once: the working set stays in the processor's cache
_AXIS = ((np.arange(IMAGE_SIZE) + 0.5) * 2 / IMAGE_SIZE - 1).astype(np.float32)


Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of u, v: below 0 inside the shape
Tone = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # of p, q and a salt for each image: 0..1


class Kinds(NamedTuple):
    """Shapes and textures that the factors `shape` and `texture` index."""

    distances: dict[str, Distance]
    tones: dict[str, Tone]


class Style(NamedTuple):
    """How a scene is drawn; lengths are fractions of the frame, angles in radians, grey levels in 0..1."""

    rotation: float = 0.5
    size: tuple[float, float] = (0.6, 0.95)
    aspect: float = 0.12
    frequency: tuple[float, float] = (7.0, 10.0)
    contrast: tuple[float, float] = (0.35, 0.7)
    clutter: float = 0.25
    noise: float = 0.05
    occluded: float = 0.3
    outline: float = 0.0
    ink: bool = False


PHOTO = Style()
REDRAWN = Style(rotation=0.8, size=(0.5, 0.8), aspect=0.25, frequency=(8.0, 12.0), clutter=0.4, noise=0.07,
                occluded=0.4, outline=0.07)  # fmt: skip
SKETCH = Style(clutter=0.0, noise=0.03, occluded=0.0, ink=True)


# ---- geometry: signed distance to a shape of radius about 1, negative inside ----------------------


def _sides(u: np.ndarray, v: np.ndarray, count: int) -> list[np.ndarray]:
    angles = np.pi / 2 + np.pi / count + 2 * np.pi * np.arange(count) / count
    return [np.float32(np.cos(a)) * u - np.float32(np.sin(a)) * v for a in angles]


def _polygon(u: np.ndarray, v: np.ndarray, count: int, apothem: float) -> np.ndarray:
    return np.maximum.reduce(_sides(u, v, count)) - apothem


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A pentagram is where at most one of the five sides is crossed: the second largest distance decides.
    first = second = np.full_like(u, -9)
    for side in _sides(u, -v, 5):
        second = np.maximum(second, np.minimum(first, side))
        first = np.maximum(first, side)
    return second - 0.36


def box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    lobes = np.hypot(np.abs(u) - 0.42, v + 0.35) - 0.5
    return np.minimum(lobes, np.maximum((np.abs(u) * 1.05 + v - 0.9) * 0.69, -0.2 - v))


def _arrow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    head = np.maximum((np.abs(v) + u - 0.95) * 0.7, 0.05 - u)
    return np.minimum(head, box(u + 0.4, v, 0.5, 0.25))


def _drop(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    tip = np.maximum((np.abs(u) * 2 + -v - 1.0) * 0.45, v - 0.1)
    return np.minimum(np.hypot(u, v - 0.35) - 0.58, tip)


def _clover(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    leaves = [np.hypot(u - 0.52 * np.cos(a), v - 0.52 * np.sin(a)) - 0.42 for a in (-1.571, 0.524, 2.618)]
    return np.minimum.reduce(leaves).astype(np.float32)


_DISTANCE: dict[str, Distance] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.85,
    "square": lambda u, v: box(u, v, 0.75, 0.75),
    "triangle": lambda u, v: _polygon(u, v - 0.2, 3, 0.55),
    "star": _star,
    "cross": lambda u, v: np.minimum(box(u, v, 0.92, 0.3), box(u, v, 0.3, 0.92)),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.66) - 0.25,
    "heart": _heart,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.9, 0.72 - np.hypot(u - 0.45, v)),
    "hexagon": lambda u, v: _polygon(u, v, 6, 0.78),
    "arrow": _arrow,
    "diamond": lambda u, v: (np.abs(u) / 0.6 + np.abs(v) - 0.98) * 0.5,
    "drop": _drop,
    "pentagon": lambda u, v: _polygon(u, v, 5, 0.74),
    "bowtie": lambda u, v: np.maximum(np.abs(u) - 0.9, (np.abs(v) - np.abs(u) * 0.75 - 0.08) * 0.8),
    "clover": _clover,
    "pill": lambda u, v: np.hypot(u, np.maximum(np.abs(v) - 0.5, 0)) - 0.4,
}


# ---- textures: how much of the second tone, 0..1 --------------------------------------------------


def _hash(i: np.ndarray, j: np.ndarray, salt: np.ndarray) -> np.ndarray:
    """A pseudo-random number in 0..1 for each integer cell, by integer mixing."""
    h = i.astype(np.uint32) * np.uint32(374761393) + j.astype(np.uint32) * np.uint32(668265263) + salt
    h = (h ^ (h >> np.uint32(13))) * np.uint32(1274126177)
    return ((h ^ (h >> np.uint32(16))) & np.uint32(0xFFFF)).astype(np.float32) / 65535


def step(wave: np.ndarray, sharpness: float = 2.5) -> np.ndarray:
    return np.clip(0.5 + sharpness * wave, 0, 1)


def _speckled(p: np.ndarray, q: np.ndarray, salt: np.ndarray) -> np.ndarray:
    cells = [np.floor(t * np.float32(0.75)).astype(np.int32) for t in (p, q)]
    return (_hash(*cells, salt) > 0.6).astype(np.float32)


_TONE: dict[str, Tone] = {
    "plain": lambda p, q, salt: np.zeros_like(p),
    "striped": lambda p, q, salt: step(np.sin(p)),
    "dotted": lambda p, q, salt: step(np.cos(p) + np.cos(q) - 0.7, 1.5),
    "checkered": lambda p, q, salt: step(np.sin(p * 0.8) * np.sin(q * 0.8), 4.0),
    "zigzag": lambda p, q, salt: step(np.sin(p + 1.2 * np.arcsin(np.sin(q * 0.9)))),
    "speckled": _speckled,
    "ringed": lambda p, q, salt: step(np.sin(1.1 * np.hypot(p, q))),
    "hatched": lambda p, q, salt: np.maximum(step(np.sin(p) - 0.6), step(np.sin(q) - 0.6)),
}


KINDS = Kinds(_DISTANCE, _TONE)
SHAPES, TEXTURES = tuple(_DISTANCE), tuple(_TONE)


# ---- one scene ------------------------------------------------------------------------------------


def _between(rng: np.random.Generator, low: float | int, high: float | int, *shape: int) -> np.ndarray:
    return rng.random(shape, np.float32) * np.float32(high - low) + np.float32(low)


def _frame(rng: np.random.Generator, n: int, style: Style) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Object coordinates (u, v) of every pixel, and pixels per unit of them, under a random pose."""
    half = _between(rng, *style.size, n, 1, 1)
    room = np.clip(1 - half, 0.05, 1)  # an object may leave the frame a little, never by much
    x = _AXIS[None, None, :] - room * _between(rng, -1, 1, n, 1, 1)
    y = _AXIS[None, :, None] - room * _between(rng, -1, 1, n, 1, 1)
    angle = _between(rng, -style.rotation, style.rotation, n, 1, 1)
    stretch = np.exp(_between(rng, -style.aspect, style.aspect, n, 1, 1))
    u = (np.cos(angle) * x + np.sin(angle) * y) / (half * stretch)
    v = (np.cos(angle) * y - np.sin(angle) * x) / (half / stretch)
    return u, v, half * (IMAGE_SIZE / 2)


def _tones(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, texture: np.ndarray, style: Style, kinds: Kinds
) -> np.ndarray:
    n, functions = len(u), list(kinds.tones.values())
    turn, rate = _between(rng, -0.6, 0.6, n, 1, 1), _between(rng, *style.frequency, n, 1, 1)
    cos, sin = np.cos(turn) * rate, np.sin(turn) * rate
    p = cos * u + sin * v + _between(rng, 0, 6.28, n, 1, 1)
    q = cos * v - sin * u + _between(rng, 0, 6.28, n, 1, 1)
    salt = rng.integers(0, 2**32, (n, 1, 1), np.uint32)
    tones = np.zeros_like(u)
    for index in np.unique(texture):
        rows = texture == index
        tones[rows] = functions[index](p[rows], q[rows], salt[rows])
    return tones


def _backdrop(rng: np.random.Generator, background: np.ndarray, style: Style) -> np.ndarray:
    """A background colour under smooth coloured clutter: a 5 x 5 grid of colours, stretched linearly."""
    n, cells = len(background), 5
    knots = (_AXIS + 1) / 2 * (cells - 1)
    weights = np.clip(1 - np.abs(knots[:, None] - np.arange(cells)[None]), 0, 1).astype(np.float32)
    grid = _between(rng, -style.clutter, style.clutter, n, 3, cells, cells)
    shade = _between(rng, 0.45, 0.9, n, 1)
    return weights @ grid @ weights.T + (_RGB[background] * shade)[:, :, None, None]


def _finish(rng: np.random.Generator, images: np.ndarray, style: Style) -> np.ndarray:
    """Light from a side, a bar across the object in some images, noise; then bytes."""
    n = len(images)
    light = _between(rng, -0.2, 0.2, 2, n, 1, 1, 1)
    images = images * (1 + light[0] * _AXIS[:, None] + light[1] * _AXIS[None, :])
    angle, offset = _between(rng, 0, 3.14159, n, 1, 1), _between(rng, -0.7, 0.7, n, 1, 1)
    width = np.where(rng.random((n, 1, 1)) < style.occluded, _between(rng, 0.05, 0.16, n, 1, 1), -9)
    across = np.abs(np.cos(angle) * _AXIS[None, None, :] + np.sin(angle) * _AXIS[None, :, None] - offset)
    images = np.where((across < width)[:, None], _between(rng, 0, 1, n, 3, 1, 1), images)
    images += rng.standard_normal(images.shape, np.float32) * (style.noise * _between(rng, 0, 2, n, 1, 1, 1))
    return (np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)


def _compose(
    rng: np.random.Generator,
    distance: np.ndarray,
    tones: np.ndarray,
    colour: np.ndarray,
    background: np.ndarray,
    style: Style,
) -> np.ndarray:
    """Paint the object (`distance` in pixels, negative inside) over its background."""
    n = len(distance)
    mask = np.clip(0.5 - distance, 0, 1)[:, None]
    if style.ink:  # dark lines on paper: outline and texture, no fill
        lines = np.clip(1.6 - np.abs(distance), 0, 1)[:, None]
        strokes = np.maximum(lines, mask * tones[:, None] * 0.7)
        return _finish(rng, np.repeat(0.95 - 0.8 * strokes, 3, axis=1), style)
    base = _RGB[colour] * _between(rng, 0.8, 1.0, n, 1)
    bright = base.mean(1, keepdims=True) > _between(rng, 0.35, 0.65, n, 1)
    depth = _between(rng, *style.contrast, n, 1)
    second = np.where(bright, base * (1 - depth), base + (1 - base) * depth)
    fill = base[:, :, None, None] + tones[:, None] * (second - base)[:, :, None, None]
    if style.outline:
        fill = fill * (1 - 0.85 * np.clip(distance + style.outline * IMAGE_SIZE, 0, 1)[:, None])
    backdrop = _backdrop(rng, background, style)
    return _finish(rng, backdrop + mask * (fill - backdrop), style)


def draw_shapes(
    rng: np.random.Generator, factors: dict[str, np.ndarray], style: Style, kinds: Kinds = KINDS
) -> np.ndarray:
    """Images of shapes; `factors` holds indices of shape, texture, colour and background."""
    shape, functions = factors["shape"], list(kinds.distances.values())
    images = np.empty((len(shape), 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for start in range(0, len(shape), CHUNK):
        part = slice(start, start + CHUNK)
        u, v, pixels = _frame(rng, len(shape[part]), style)
        distance = np.empty_like(u)
        for index in np.unique(shape[part]):
            rows = shape[part] == index
            distance[rows] = functions[index](u[rows], v[rows])
        tones = _tones(rng, u, v, factors["texture"][part], style, kinds)
        colours = factors["colour"][part], factors["background"][part]
        images[part] = _compose(rng, distance * pixels, tones, *colours, style)
    return images


# ---- printed digits, for pretraining --------------------------------------------------------------

_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSansMono",
          "STIXGeneral", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10")  # fmt: skip


@lru_cache(maxsize=1)
def _glyphs() -> np.ndarray:
    """Signed distances [fonts, 10, 64, 64] to printed digits, in units of half the glyph's height."""
    folder, side, fields = Path(matplotlib.get_data_path(), "fonts", "ttf"), 64, []
    for name in _FONTS:
        font = ImageFont.truetype(folder / f"{name}.ttf", 160)
        for digit in "0123456789":
            canvas = Image.new("L", (320, 320))
            ImageDraw.Draw(canvas).text((160, 160), digit, 255, font, anchor="mm")
            left, top, right, bottom = canvas.getbbox()
            half, x, y = (bottom - top) / 2, (left + right) / 2, (top + bottom) / 2
            half *= 1.4
            box = tuple(round(edge) for edge in (x - half, y - half, x + half, y + half))
            inside = np.asarray(canvas.crop(box).resize((2 * side, 2 * side))) > 127
            field = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
            fields.append(field.reshape(side, 2, side, 2).mean((1, 3)) * 1.4 / side)
    return np.array(fields, np.float32).reshape(len(_FONTS), 10, side, side)


def draw_digits(rng: np.random.Generator, factors: dict[str, np.ndarray]) -> np.ndarray:
    """Images of printed digits, sheared, bent, thinned or thickened; a third of them light on dark."""
    digit = factors["digit"]
    parts = [{name: values[start : start + CHUNK] for name, values in factors.items()}
             for start in range(0, len(digit), CHUNK)]  # fmt: skip
    return np.concatenate([np.empty((0, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8), *(_digits(rng, p) for p in parts)])


def _digits(rng: np.random.Generator, factors: dict[str, np.ndarray]) -> np.ndarray:
    n = len(factors["digit"])
    u, v, pixels = _frame(rng, n, PHOTO._replace(rotation=0.2, aspect=0.25))
    u = u + _between(rng, -0.35, 0.35, n, 1, 1) * v
    bends = []
    for t in (v, u):
        swing, rate, phase = (_between(rng, *ends, n, 1, 1) for ends in ((0, 0.12), (1, 4), (0, 6.28)))
        bends.append(swing * np.sin(rate * t + phase))
    side = _glyphs().shape[-1]
    column, row = [np.clip(((t + b) / 1.4 + 1) * side / 2, 0, side - 1).astype(np.intp)
                   for t, b in zip((u, v), bends, strict=True)]  # fmt: skip
    font = rng.integers(len(_FONTS), size=(n, 1, 1))
    field = _glyphs()[font, factors["digit"][:, None, None], row, column] - _between(rng, -0.03, 0.1, n, 1, 1)
    distance = field * pixels * _between(rng, 0.15, 1, n, 1, 1)  # a blurred edge stands for a coarse scan
    colours, plain = (factors["colour"], factors["background"]), np.zeros_like(u)
    images = _compose(rng, distance, plain, *colours, PHOTO._replace(occluded=0.1))
    white = np.repeat(np.clip(0.5 - distance, 0, 1)[:, None], 3, axis=1)
    dark = _finish(rng, white, PHOTO._replace(occluded=0.0))
    return np.where(rng.random((n, 1, 1, 1)) < 1 / 3, dark, images)


# ---- corruptions ----------------------------------------------------------------------------------


def corrupt(rng: np.random.Generator, images: np.ndarray, kind: np.ndarray, severity: int) -> np.ndarray:
    """One of CORRUPTIONS for each image, graded by `severity` 1..5."""
    x, grade = images.astype(np.float32) / 255, severity / 5
    for index, name in enumerate(CORRUPTIONS):
        rows = kind == index
        if name == "noise":
            x[rows] += rng.standard_normal(x[rows].shape, np.float32) * (0.4 * grade)
        elif name == "blur":
            x[rows] = ndimage.gaussian_filter(x[rows], (0, 0, 2.8 * grade, 2.8 * grade))
        elif name == "contrast":
            x[rows] = 0.5 + (x[rows] - x[rows].mean((1, 2, 3), keepdims=True)) * (1 - 0.85 * grade)
        elif name == "pixels":
            block = (2, 3, 4, 6, 8)[severity - 1]
            side = IMAGE_SIZE // block
            coarse = x[rows].reshape(-1, 3, side, block, side, block).mean((3, 5))
            x[rows] = coarse.repeat(block, 2).repeat(block, 3)
        else:
            corner = _between(rng, -1, 1 - 1.2 * grade, 2, int(rows.sum()), 1, 1)
            inside = [(axis >= c) & (axis < c + 1.2 * grade)
                      for axis, c in zip((_AXIS[:, None], _AXIS[None, :]), corner, strict=True)]  # fmt: skip
            x[rows] = np.where((inside[0] & inside[1])[:, None], 0.5, x[rows])
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)
