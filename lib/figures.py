"""Figures: one style, one palette, one way to save.

A method has the same colour and marker in every notebook; zero-shot is grey and AMU-Tuning the accent. Saving is
reproducible: the same numbers give the same bytes, as png for reading and as svg for papers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMN = 3.5  # width of a paper's column in inches; figures are one or two of them wide
ACCENT = "#c8321e"
GREY = "#6e6e6e"

# Okabe and Ito's palette, told apart in greyscale by the markers; families of methods share a hue.
STYLES: dict[str, tuple[str, str]] = {
    "zero_shot": (GREY, "_"),
    "linear_probe": ("#000000", "x"),
    "aux_only": ("#0072b2", "s"),
    "amu": (ACCENT, "o"),
    "amu_code": ("#e08a7e", "D"),
    "amu_convex": ("#7a1d10", "^"),
    "tip_adapter": ("#009e73", "v"),
    "tip_adapter_f": ("#00634a", "^"),
    "cafo": ("#56b4e9", "p"),
    "clip_adapter": ("#b58900", "<"),
    "taskres": ("#e69f00", ">"),
    "text_probe": ("#8c6d1f", "1"),
    "cross_modal": ("#d9b44a", "2"),
    "gda": ("#7b3294", "P"),
    "ape": ("#66c2a5", "*"),
    "lp_plus_plus": ("#4d4d4d", "X"),
    "clap": ("#cc79a7", "h"),
    "proker": ("#a6bddb", "d"),
    "m_adapter": ("#1b9e77", "3"),
    "transclip": ("#9e5ea8", "4"),
}

RC = {
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "image.cmap": "cividis",
    "svg.hashsalt": "logit-bias-workbook",
}


def use_style() -> None:
    """Switch the workbook's look on for every figure that follows."""
    mpl.rcParams.update(RC)


def colour(method: str) -> str:
    """Return the colour of a method; grey-brown for one that has none yet."""
    return STYLES.get(method, ("#8a7f72", "."))[0]


def marker(method: str) -> str:
    """Return the marker of a method."""
    return STYLES.get(method, ("#8a7f72", "."))[1]


def save_figure(fig: Figure, name: str, folder: Path) -> list[Path]:
    """Write `folder/name.png` and `.svg`, each replaced in one step; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        path = folder / f"{name}{suffix}"
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        fig.savefig(partial, format=suffix[1:], metadata=metadata)
        os.replace(partial, path)
        paths.append(path)
    return paths


def shots_axis(ax: Axes, shots: Sequence[int]) -> None:
    """Make x the number of shots: a log scale with one tick per value."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(shots), [str(k) for k in shots])
    ax.minorticks_off()
    ax.set_xlabel("shots (labelled images per class)")


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, float, str]], gap: float = 0.045) -> None:
    """Write each line's name beside its last point, moved apart where names would overlap.

    Args:
        ends: name -> (x, y, colour) in data units.
        gap: smallest distance of two names as a share of the axis' height.
    """
    low, high = ax.get_ylim()
    places: list[float] = []
    for name, (x, y, ink) in sorted(ends.items(), key=lambda item: item[1][1]):
        place = max(y, places[-1] + gap * (high - low)) if places else y
        places.append(place)
        ax.annotate(
            name,
            (x, y),
            xytext=(1.03, (place - low) / (high - low)),
            textcoords="axes fraction",
            color=ink,
            va="center",
            fontsize=7,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": ink, "lw": 0.5, "shrinkA": 0, "shrinkB": 3},
        )


def image_grid(axes: Sequence[Axes], images: Sequence[np.ndarray], titles: Sequence[str]) -> None:
    """Show one image in each axes with its title above; axes left over are hidden."""
    for ax in axes:
        ax.axis("off")
    for ax, image, title in zip(axes, images, titles, strict=False):
        ax.imshow(image, interpolation="nearest")
        ax.set_title(title, fontsize=6, loc="center", pad=2)
