"""Shapes and textures that only the encoder `other-classes` is trained on.

None of them is in `draw.KINDS`, from which the evaluated classes and all other training images are drawn: what this
encoder knows of an evaluated class it knows from other classes.
"""

import numpy as np
from draw import Kinds, box, step

# ---- signed distance to a shape of radius about 1, negative inside; y points down -------------------------


def _outline(u, v, points):
    """Exact signed distance to a closed polygon of any form, by its corners."""
    nearest, outside = np.full_like(u, np.inf), np.ones_like(u)
    for (x, y), (x0, y0) in zip(points, points[-1:] + points[:-1], strict=True):
        du, dv, eu, ev = u - np.float32(x), v - np.float32(y), np.float32(x0 - x), np.float32(y0 - y)
        along = np.clip((du * eu + dv * ev) / (eu * eu + ev * ev), 0, 1)
        nearest = np.minimum(nearest, (du - eu * along) ** 2 + (dv - ev * along) ** 2)
        low, high, left = v >= np.float32(y), v < np.float32(y0), eu * dv > ev * du
        crosses = (low & high & left) | (~low & ~high & ~left)
        outside = np.where(crosses, -outside, outside)
    return outside * np.sqrt(nearest)


def _house(u, v):
    return _outline(
        u, v, [(-0.62, 0.85), (-0.62, -0.1), (-0.95, -0.1), (0, -0.95), (0.95, -0.1), (0.62, -0.1), (0.62, 0.85)]
    )


def _bolt(u, v):
    return _outline(
        u, v, [(0.25, -1.0), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1.0), (0.6, -0.25), (0.05, -0.25), (0.65, -1.0)]
    )


def _stairs(u, v):
    return _outline(
        u,
        v,
        [
            (-0.85, 0.85),
            (-0.85, 0.3),
            (-0.3, 0.3),
            (-0.3, -0.27),
            (0.28, -0.27),
            (0.28, -0.85),
            (0.85, -0.85),
            (0.85, 0.85),
        ],
    )


def _flower(u, v):
    return (np.hypot(u, v) - 0.66 - 0.24 * np.cos(5 * np.arctan2(u, -v))) * 0.65


def _gear(u, v):
    r, tooth = np.hypot(u, v), np.clip(3 * np.cos(8 * np.arctan2(u, -v)), -1, 1)
    return np.maximum(r - 0.76 - 0.13 * tooth, 0.3 - r)


def _fish(u, v):
    body = (np.hypot((u - 0.25) / 0.7, v / 0.48) - 1) * 0.5
    return np.minimum(body, _outline(u, v, [(-0.25, 0.0), (-0.95, -0.55), (-0.95, 0.55)]))


def _mushroom(u, v):
    cap = np.maximum(np.hypot(u, v - 0.1) - 0.92, v - 0.1)
    return np.minimum(cap, box(u, v - 0.45, 0.27, 0.5))


def _cloud(u, v):
    puffs = [
        np.hypot(u - x, v - y) - r
        for x, y, r in ((-0.55, 0.2, 0.4), (0.55, 0.2, 0.4), (-0.1, -0.15, 0.48), (0.35, -0.1, 0.3))
    ]
    return np.minimum.reduce([*puffs, box(u, v - 0.4, 0.55, 0.2)])


def _key(u, v):
    teeth = [box(u - x, v - 0.28, 0.11, 0.26) for x in (0.45, 0.82)]
    return np.minimum.reduce([np.abs(np.hypot(u + 0.5, v) - 0.3) - 0.14, box(u - 0.35, v, 0.6, 0.13), *teeth])


def _chevron(u, v):
    return np.maximum(np.abs(u) - 0.88, (np.abs(v + 0.36 - np.abs(u) * 0.8) - 0.4) * 0.78)


def _trapezoid(u, v):
    return np.maximum(np.abs(v) - 0.58, (np.abs(u) - 0.65 - 0.45 * v) * 0.91)


_DISTANCE = {
    "semicircle": lambda u, v: np.maximum(np.hypot(u, v - 0.45) - 0.95, v - 0.45),
    "trapezoid": _trapezoid,
    "ell": lambda u, v: np.minimum(box(u + 0.35, v, 0.27, 0.88), box(u, v - 0.6, 0.62, 0.28)),
    "tee": lambda u, v: np.minimum(box(u, v + 0.58, 0.85, 0.27), box(u, v, 0.26, 0.85)),
    "house": _house,
    "flower": _flower,
    "gear": _gear,
    "bolt": _bolt,
    "parallelogram": lambda u, v: np.maximum(np.abs(v) - 0.5, (np.abs(u + 0.6 * v) - 0.65) * 0.86),
    "fish": _fish,
    "mushroom": _mushroom,
    "frame": lambda u, v: np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.63) - 0.2,
    "chevron": _chevron,
    "cloud": _cloud,
    "key": _key,
    "stairs": _stairs,
}

# ---- textures: how much of the second tone, 0..1 ----------------------------------------------------------


def _line(t, width):
    """1 on lines at every integer of t, `width` of a period wide."""
    return np.clip((np.float32(width) / 2 - np.abs(t - np.round(t))) * 8 + 0.5, 0, 1)


def _bricked(p, q, salt):
    row = np.floor(q / np.float32(2.6))
    return np.maximum(_line(q / np.float32(2.6), 0.25), _line(p / np.float32(5.2) + row % 2 / 2, 0.12))


def _scaled(p, q, salt):
    row = np.floor(q / np.float32(2.4))
    x, y = p / np.float32(4.0) + row % 2 / 2, q / np.float32(2.4) - row
    return step(0.2 - np.abs(np.hypot(2 * (x - np.floor(x)) - 1, y) - 0.85), 5.0)


def _rayed(p, q, salt):
    return step(np.sin(8 * np.arctan2(q - np.float32(3.1), p - np.float32(3.1))))


def _marbled(p, q, salt):
    vein = np.sin(0.45 * p + 1.6 * np.sin(0.6 * q + 0.9) + 0.9 * np.sin(0.8 * p - 0.5 * q))
    return np.clip(1.1 - 2.2 * np.abs(vein), 0, 1)


def _dashed(p, q, salt):
    gap = np.sin(0.7 * q + 3.14 * (np.floor(p / np.float32(6.2832)) % 2))
    return step(np.sin(p) - 0.1) * step(gap + 0.3)


def _woven(p, q, salt):
    even = (np.floor(p / np.float32(3.6)) + np.floor(q / np.float32(3.6))) % 2 == 0
    return step(np.sin(np.where(even, p, q) * np.float32(1.7453 * 2)), 2.0)


def _tiled(p, q, salt):
    return step(np.sin(p) * np.sin(p / 2 + 0.866 * q) * np.sin(p / 2 - 0.866 * q), 6.0)


_TONE = {
    "bricked": _bricked,
    "scaled": _scaled,
    "rayed": _rayed,
    "marbled": _marbled,
    "graded": lambda p, q, salt: 0.5 + 0.5 * np.sin(0.3 * p),
    "dashed": _dashed,
    "woven": _woven,
    "tiled": _tiled,
}

KINDS = Kinds(_DISTANCE, _TONE)
SHAPES, TEXTURES = tuple(_DISTANCE), tuple(_TONE)
