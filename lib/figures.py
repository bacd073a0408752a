"""Figures: one style, one palette, one way to save.

A method has the same colour and marker in every notebook; zero-shot is grey and AMU-Tuning the accent. Saving is
reproducible: the same numbers give the same bytes, as png for reading and as svg for papers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

from lib import fusion, metrics
from lib.files import replace_file
from lib.metrics import Classes, Labels, Logits

COLUMN, PAGE = 8 / 2.54, 17 / 2.54  # the two widths of a figure in inches: a paper's column, and its page
ACCENT = "#c8321e"
GREY = "#6e6e6e"

# Okabe and Ito's palette, told apart in greyscale by the markers; families of methods share a hue.
# fmt: off
STYLES: dict[str, tuple[str, str]] = {
    "zero_shot": (GREY, "_"), "linear_probe": ("#000000", "x"), "aux_only": ("#0072b2", "s"), "amu": (ACCENT, "o"),
    "amu_code": ("#e08a7e", "D"), "amu_convex": ("#7a1d10", "^"), "tip_adapter": ("#009e73", "v"),
    "tip_adapter_f": ("#00634a", "^"), "cafo": ("#56b4e9", "p"), "clip_adapter": ("#b58900", "<"),
    "taskres": ("#e69f00", ">"), "text_probe": ("#8c6d1f", "1"), "cross_modal": ("#b8902a", "2"),
    "gda": ("#7b3294", "P"), "ape": ("#3fa58a", "*"), "lp_plus_plus": ("#4d4d4d", "X"), "clap": ("#cc79a7", "h"),
    "proker": ("#4f86b8", "d"), "m_adapter": ("#1b9e77", "3"), "transclip": ("#9e5ea8", "4"),
    "ss_text": ("#a65628", "d"), "prompt_weights": ("#d9b44a", "<"), "timo": ("#5e2a84", "p"),
    "dmn_static": ("#2f7d5b", "h"), "frolic_prior": ("#b56fb8", "v"), "stat_a": ("#6f3f7a", "^"),
    "zlap": ("#c79bcf", "s"), "tda": ("#82508f", "D"),
}
# fmt: on
# A predictor looks like the method that made it known.
STYLES |= {"head": STYLES["amu"], "cache": STYLES["tip_adapter"], "trained_cache": STYLES["tip_adapter_f"]}
STYLES |= {"convex_head": STYLES["amu_convex"], "mlp": ("#5d4037", "H")}

UNKNOWN = ("#8a7f72", ".")
ENCODER_INKS = ("#0072b2", "#009e73", "#d55e00", "#000000", "#b58900", "#7b3294", "#56b4e9", "#cc79a7")
ENCODER_MARKERS = "osD^vPXp"

RC = {
    **{"figure.dpi": 110, "savefig.dpi": 200, "figure.constrained_layout.use": True, "axes.titlelocation": "left"},
    **{f"{part}.labelsize": 8 for part in ("axes", "xtick", "ytick")},
    **{"font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 8, "legend.title_fontsize": 8, "axes.linewidth": 0.8},
    **{f"{axis}.{kind}.width": 0.7 for axis in ("xtick", "ytick") for kind in ("major", "minor")},
    **{f"{axis}.{kind}.size": size for axis in ("xtick", "ytick") for kind, size in (("major", 3.5), ("minor", 2))},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True},
    **{"grid.color": "#e6e6e6", "grid.linewidth": 0.6, "lines.linewidth": 1.5, "lines.markersize": 4},
    **{"legend.frameon": False, "image.cmap": "cividis", "svg.hashsalt": "logit-bias-workbook"},
}


def use_style() -> None:
    """Switch the workbook's look on for every figure that follows: seaborn's paper theme with our sizes."""
    sns.set_theme("paper", "ticks", ENCODER_INKS, font="DejaVu Sans", rc=RC)


def colour(method: str) -> str:
    """Colour of a method; grey-brown for one that has none yet."""
    return STYLES.get(method, UNKNOWN)[0]


def marker(method: str) -> str:
    """Marker of a method."""
    return STYLES.get(method, UNKNOWN)[1]


def short_name(encoder: str) -> str:
    """Name of an encoder as axes have room for it: no library, no `aux_`."""
    return ",".join(part.split(":", 1)[-1].removeprefix("aux_") for part in encoder.split(","))


def encoder_styles(encoders: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each encoder, by its place in the list."""
    looks = zip(encoders, cycle(ENCODER_INKS), cycle(ENCODER_MARKERS), strict=False)
    return {name: {"color": ink, "marker": mark} for name, ink, mark in looks}


def dataset_styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour, marker and line of each data set: black and greys, since hues are methods' and encoders'."""
    looks = zip(("#000000", "#8c8c8c", "#bdbdbd", "#5a5a5a"), "osD^", ("-", "--", ":", "-."), strict=True)
    looks = [dict(zip(("color", "marker", "ls"), look, strict=True)) for look in looks]
    return {name: looks[i % len(looks)] for i, name in enumerate(names)}


def save_figure(fig: Figure, name: str, folder: Path) -> list[Path]:
    """Paths of `folder/name.png` and `.svg`, each written in one step; the same numbers give the same bytes.

    The layout is computed once and then kept: constrained layout would move a little at every drawing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dpi = fig.dpi
    fig.set_dpi(RC["savefig.dpi"])  # letters are as wide as they will be
    fig.draw_without_rendering()
    fig.set_dpi(dpi)
    fig.set_layout_engine("none")
    paths = []
    for kind, about in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        write = partial(fig.savefig, format=kind, dpi=RC["savefig.dpi"], metadata=about)
        paths.append(replace_file(folder / f"{name}.{kind}", write))
    return paths


def plain_ticks(ax: Axes, x: Sequence[float] | None = None, y: Sequence[float] | None = None) -> None:
    """Put ticks of a logarithmic axis where they are wanted and write them as plain numbers, without minor ones."""
    for axis, values in ((ax.xaxis, x), (ax.yaxis, y)):
        if values is not None:
            axis.set_minor_locator(NullLocator())
            axis.set_ticks(list(values), [f"{value:,g}" for value in values])


def shots_axis(ax: Axes, shots: Sequence[int]) -> None:
    """Make x the number of shots: a log scale with one tick per value."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(shots), [str(k) for k in shots])
    ax.minorticks_off()
    ax.set_xlabel("shots (labelled images per class)")


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, float, str]], gap: float = 0.045) -> None:
    """Write each line's name beside its last point (x, y, colour), at least `gap` heights of the axes apart."""
    low, high = ax.get_ylim()
    ordered = sorted(ends.items(), key=lambda item: item[1][1])
    places = spread([(y - low) / (high - low) for _, (_, y, _) in ordered], gap)
    for (name, (x, y, ink)), place in zip(ordered, places, strict=True):
        line = {"arrowstyle": "-", "color": ink, "lw": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
        look = {"color": ink, "va": "center", "fontsize": 7, "annotation_clip": False, "arrowprops": line}
        ax.annotate(name, (x, y), xytext=(1.04, place), textcoords="axes fraction", **look)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart and inside [0, 1] where they fit, near the wanted ones, which must ascend."""
    groups: list[tuple[float, int]] = []  # centre and size of runs of touching names
    for place in wanted:
        centre, size = place, 1
        while True:
            half = gap * (size - 1) / 2
            centre = max(half, min(centre, 1 - half))
            if not groups or centre - half >= groups[-1][0] + gap * (groups[-1][1] + 1) / 2 - 1e-9:
                break
            other, count = groups.pop()
            centre, size = (centre * size + other * count) / (size + count), size + count
        groups.append((centre, size))
    return [centre + gap * (i - (size - 1) / 2) for centre, size in groups for i in range(size)]


def label_points(ax: Axes, points: Mapping[str, tuple[float, float, str]], away: float = 6) -> None:
    """Write each name beside its point (x, y, colour), `away` in typographic points.

    It takes the first side where it meets no other point and no other name, else the one where it meets fewest.
    """
    ax.figure.canvas.draw()
    radius = 0.8 * away * ax.figure.dpi / 72
    centres = [ax.transData.transform(point[:2]) for point in points.values()]
    taken = [Bbox.from_extents(*at - radius, *at + radius) for at in centres]
    sides = [(1, 0, "left"), (-1, 0, "right"), (0, 1.4, "center"), (0, -1.4, "center"), (1, 1.4, "left")]
    sides += [(-1, 1.4, "right"), (1, -1.4, "left"), (-1, -1.4, "right"), (1, 2.8, "left"), (1, -2.8, "left")]
    for name, (x, y, ink) in points.items():
        text = ax.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", va="center", color=ink, fontsize=7)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        boxes = []
        for along, up, align in sides:
            text.set(position=(along * away, up * away), ha=align)
            box = text.get_window_extent()
            inside = ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1
            boxes.append((sum(box.overlaps(other) for other in taken) + 2 * (not inside), len(boxes), box))
        best = min(boxes, key=lambda box: box[:2])
        along, up, align = sides[best[1]]
        text.set(position=(along * away, up * away), ha=align)
        taken.append(best[2])


def image_grid(axes: Sequence[Axes], images: Sequence[np.ndarray], titles: Sequence[str]) -> None:
    """Show one image in each axes with its title above; axes left over are hidden."""
    for ax in axes:
        ax.axis("off")
    for ax, image, title in zip(axes, images, titles, strict=False):
        ax.imshow(image, interpolation="nearest")
        ax.set_title(title, fontsize=5.2, loc="center", pad=2)


def heat_map(
    ax: Axes, table: pd.DataFrame, form: str = "{:.1f}", signed: bool = False, floor: float | None = None
) -> None:
    """Draw a table as coloured cells with their numbers; light is more, cells without a number stay empty.

    A `signed` one holds losses and gains: white is 0, darker is further from it, and the sign is in the number. Values
    below `floor` share its colour, so that a few bad ones do not hide the differences of the rest.
    """
    limit = float(np.nanmax(np.abs(table.to_numpy(dtype=float)))) or 1.0
    look = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "cividis", "vmin": floor}
    numbers = table.map(form.format)
    sns.heatmap(table.astype(float), ax=ax, annot=numbers, fmt="", annot_kws={"fontsize": 6}, cbar=False, **look)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0, rotation=0)


def draw_fusion(s0: Logits, bias: Logits, y: Labels, classes: Classes, beta: float, rho: float) -> Figure:
    """Gain of `s0 + beta u(s0) bias` over beta, and the images it repairs and breaks at one beta and rho."""
    betas, labelled = np.geomspace(0.01, 100, 49), int((y >= 0).sum())
    zero_shot = metrics.accuracy(s0, y, classes)
    rule = partial(fusion.uncertain, rho=rho)
    repaired, broken = map(len, metrics.repaired_and_broken(s0, rule(s0, bias, beta=beta), y, classes))
    fig, (ax, side) = plt.subplots(1, 2, figsize=(PAGE, 2.2), width_ratios=(2, 1))
    for weighted, ink in ((partial(fusion.uncertain, rho=0.0), "#b0b0b0"), (rule, ACCENT)):
        over = fusion.accuracy_over_beta(weighted, s0, bias, y, betas.tolist(), classes)
        ax.plot(betas, 100 * (np.array(over) - zero_shot), color=ink)
    ax.plot(beta, 100 * (repaired - broken) / labelled, "o", color=ACCENT, mec="k")
    title = f"β = {beta:.3g}, ρ = {rho:.2f}: {100 * zero_shot + 100 * (repaired - broken) / labelled:.1f} %"
    ax.set(xscale="log", xlabel="β (grey: ρ = 0)", ylabel="gain over zero-shot (points)", title=title)
    side.barh(["repaired", "broken"], [repaired, broken], color=["black", "#b0b0b0"])
    side.invert_yaxis()
    side.set(xlabel="test images", title=f"net {repaired - broken:+d} of {labelled}")
    return fig


def explore_fusion(
    s0: Logits, bias: Logits, y: Labels, classes: Classes = None, beta: float = 5.0
) -> ipywidgets.interactive | None:
    """Sliders of beta and rho over `draw_fusion`; in a headless run, LOGIT_BIAS_RUN, its picture at rho = 0.4 alone.

    On test images they are there to understand, not to choose by.
    """
    draw = partial(draw_fusion, s0, bias, y, classes)
    if "LOGIT_BIAS_RUN" in os.environ:
        draw(beta, 0.4)
        return None
    once = {"continuous_update": False}
    log_beta = ipywidgets.FloatLogSlider(beta, min=-2, max=2, step=0.05, description="β", **once)
    rho = ipywidgets.FloatSlider(0.4, min=0.0, max=2.0, step=0.05, description="ρ", **once)
    return ipywidgets.interactive(lambda beta, rho: draw(beta, rho) and None, beta=log_beta, rho=rho)
