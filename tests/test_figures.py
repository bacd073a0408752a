"""Figures: names do not overlap, files repeat to the byte, and drawn numbers are the given ones."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib import figures, fusion, methods, metrics


@pytest.fixture
def ax():
    figures.use_style()
    fig, axes = plt.subplots()
    yield axes
    plt.close(fig)


@pytest.mark.parametrize("wanted", [[0.5], [0.1, 0.9], [0.5, 0.5, 0.5], [0.0, 0.01, 0.5], [0.4, 0.98, 0.99, 1.0, 1.2]])
def test_names_are_spread_apart_and_stay_inside(wanted):
    places = figures.spread(wanted, 0.1)
    assert len(places) == len(wanted) and np.all(np.diff(places) >= 0.1 - 1e-6)
    assert min(places) >= -1e-9 and max(places) <= 1 + 1e-9


def test_names_with_room_stay_where_they_are():
    assert figures.spread([0.2, 0.5, 0.8], 0.1) == [0.2, 0.5, 0.8]
    assert figures.spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])


def test_a_heat_map_writes_its_numbers_and_leaves_gaps_empty(ax):
    table = pd.DataFrame({"a": [1.0, np.nan], "b": [-40.0, 2.0]}, index=["x", "y"])
    figures.heat_map(ax, table, floor=-5.0)
    assert sorted(text.get_text() for text in ax.texts) == ["-40.0", "1.0", "2.0"]
    assert ax.collections[0].norm.vmin == -5
    assert [text.get_text() for text in ax.get_yticklabels()] == ["x", "y"]
    assert {text.get_rotation() for text in ax.get_yticklabels()} == {0}


def test_a_signed_heat_map_is_white_at_zero(ax):
    figures.heat_map(ax, pd.DataFrame({"a": [1.0], "b": [-4.0], "c": [0.0]}), "{:+.0f}", signed=True)
    assert [text.get_text() for text in ax.texts] == ["+1", "-4", "+0"]
    norm = ax.collections[0].norm
    assert (norm.vmin, norm.vmax) == (-4, 4)


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    figures.use_style()
    saved = []
    for folder in ("one", "two"):
        fig, axes = plt.subplots(1, 2)
        axes[0].plot([1, 2], [3, 4], label="a long name")
        axes[1].set(xlabel="name", title="title")
        fig.legend(loc="outside lower center")
        for again in ("", "again"):  # constrained layout moves at every drawing, unless it is left as it was
            paths = figures.save_figure(fig, "line", tmp_path / folder / again)
            saved.append([path.read_bytes() for path in paths])
        plt.close(fig)
    assert saved[0] == saved[1] == saved[2] == saved[3]
    assert [path.name for path in paths] == ["line.png", "line.svg"]
    assert sorted(path.name for path in (tmp_path / "one").glob("*.*")) == ["line.png", "line.svg"]


def test_every_method_has_a_look_of_its_own():
    looks = [figures.STYLES[name] for name in methods.METHODS if name in figures.STYLES]
    assert set(methods.METHODS) <= set(figures.STYLES) and len(set(looks)) == len(looks)
    assert figures.colour("amu") == figures.ACCENT and figures.marker("nobody") == figures.UNKNOWN[1]
    styles = figures.encoder_styles([f"encoder {i}" for i in range(10)])
    assert styles["encoder 0"] == styles["encoder 8"] != styles["encoder 1"]


def test_the_sliders_of_beta_and_rho_draw_what_fusion_gives(make_task, monkeypatch):
    task = make_task()
    s0, y = task.test.zero_shot, task.test.y.clone()
    bias = 50 * methods.build("aux_only", epochs=2).fit(task).bias(task.test)
    y[:3] = -1
    monkeypatch.delenv("LOGIT_BIAS_RUN", raising=False)
    widget = figures.explore_fusion(s0, bias, y, beta=2.0)
    assert [child.description for child in widget.children[:2]] == ["β", "ρ"] and widget.kwargs_widgets[0].value == 2.0
    for beta, rho in ((2.0, 0.4), (20.0, 0.0), (100.0, 1.5)):
        fig = figures.draw_fusion(s0, bias, y, None, beta, rho)
        fused = fusion.uncertain(s0, bias, beta=beta, rho=rho)
        heights = [bar.get_width() for bar in fig.axes[1].patches]
        assert heights == [len(rows) for rows in metrics.repaired_and_broken(s0, fused, y)] and sum(heights) > 0
        assert f"{100 * metrics.accuracy(fused, y):.1f} %" in fig.axes[0].get_title(loc="left")
    monkeypatch.setenv("LOGIT_BIAS_RUN", "somewhere")
    before = len(plt.get_fignums())
    assert figures.explore_fusion(s0, bias, y) is None and len(plt.get_fignums()) == before + 1
    plt.close("all")
