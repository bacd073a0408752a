"""Figures: names do not overlap, files repeat to the byte, and drawn numbers are the given ones."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib import figures, statistics


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
    figures.heat_map(ax, pd.DataFrame({"a": [1.0, np.nan], "b": [-40.0, 2.0]}, index=["x", "y"]), floor=-5.0)
    assert sorted(text.get_text() for text in ax.texts) == ["-40.0", "1.0", "2.0"]
    assert ax.images[0].norm.vmin == -5


def test_a_critical_difference_diagram_names_every_method_with_its_rank(ax):
    ranks = pd.Series({"a": 1.2, "b": 1.9, "c": 2.9})
    labels = {name: (name.upper(), "k") for name in ranks.index}
    figures.critical_difference(ax, ranks, 1.0, statistics.cliques(ranks, 1.0), labels)
    texts = " ".join(text.get_text() for text in ax.texts)
    assert all(piece in texts for piece in ("1.2  A", "1.9  B", "C  2.9", "critical difference 1.0"))
    assert ax.get_xlim()[0] > ax.get_xlim()[1], "the best stands on the right"


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    figures.use_style()
    found = []
    for folder in ("one", "two"):
        fig, axes = plt.subplots()
        axes.plot([1, 2], [3, 4])
        found.append([path.read_bytes() for path in figures.save_figure(fig, "line", tmp_path / folder)])
        plt.close(fig)
    assert found[0] == found[1]
