"""The plots of studies: what the artists hold is what was given."""

from io import BytesIO
from math import nan

import numpy as np
import pytest

from recipes.study.plots import Curves, intervals, learning_curves

pytestmark = pytest.mark.slow


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def labelled(ax):
    """Lines by the first word or words of their label, without the figures in brackets."""
    return {
        str(line.get_label()).partition(" (")[0]: points(line)
        for line in ax.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def drawn(figure):
    """Laying out and rendering finds what building the artists does not, such as broken mathtext."""
    figure.canvas.draw()
    return figure


class TestLearningCurves:
    CURVES = Curves([10, 20], [[3.0, 1.0], [5.0, 3.0], [4.0, 2.0]])

    def test_the_line_is_the_mean_and_the_band_the_range_over_the_seeds(self):
        figure = drawn(learning_curves({"problem": {"LS": self.CURVES}}, ylabel="loss"))
        (ax,) = figure.axes
        assert labelled(ax) == {"LS": [(10, 4.0), (20, 2.0)]}
        corners = {tuple(corner) for corner in ax.collections[0].get_paths()[0].vertices.tolist()}
        assert corners == {(10.0, 3.0), (10.0, 5.0), (20.0, 1.0), (20.0, 3.0)}
        assert ax.get_ylabel() == "loss"

    def test_variants_share_a_panel_and_panels_of_a_row_share_their_axis(self):
        other = Curves([10, 20], [[30.0, 10.0]])
        figure = drawn(learning_curves({"a": {"LS": self.CURVES, "COST": other}, "b": {"LS": self.CURVES}}, "loss"))
        first, second = figure.axes
        assert list(labelled(first)) == ["LS", "COST"]
        assert len({line.get_color() for line in first.get_lines()}) == 2
        assert first.get_ylim() == second.get_ylim()

    def test_panels_fill_rows(self):
        panels = {title: {"LS": self.CURVES} for title in "abcde"}
        figure = drawn(learning_curves(panels, "loss", columns=2))
        assert titles(figure) == list("abcde")
        grid = [(ax.get_subplotspec().rowspan.start, ax.get_subplotspec().colspan.start) for ax in figure.axes]
        assert grid == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]

    @pytest.mark.parametrize("values", [[1.0, 2.0], [[1.0, 2.0, 3.0]], np.empty((0, 2))])
    def test_shapes_must_fit(self, values):
        with pytest.raises(ValueError, match=r"shape \(runs, 2\)"):
            Curves([10, 20], values)


def test_intervals_stand_where_they_are_and_are_colored_by_what_they_exclude():
    rows = {"gain": (-2.0, -3.0, -1.0), "nothing": (0.5, -1.0, 2.0), "loss": (3.0, 2.0, 4.0), "alone": (1.0, nan, nan)}
    figure = intervals({"steps": rows, "time": rows}, xlabel="change")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == list(rows)
    assert (left.get_title(), right.get_title(), left.get_xlabel()) == ("steps", "time", "change")
    drawn = [line for line in left.lines if len(line.get_xdata()) == 2 and list(line.get_ydata()) != [0, 1]]
    assert [list(line.get_xdata()) for line in drawn[:3]] == [[-3.0, -1.0], [-1.0, 2.0], [2.0, 4.0]]
    colors = [line.get_color() for line in drawn]
    assert len(set(colors[:3])) == 3
    assert colors[3] == colors[1]
    top, bottom = left.get_ylim()[1], left.get_ylim()[0]
    assert top < 0 < len(rows) - 1 < bottom
    figure.savefig(BytesIO())


def test_no_panel_is_an_error_that_names_the_argument():
    with pytest.raises(ValueError, match="`panels` must map at least one title"):
        learning_curves({}, "loss")


@pytest.mark.parametrize("panels", [{}, {"a": {}}, {"a": {"x": (0, 0, 0)}, "b": {"y": (0, 0, 0)}}])
def test_intervals_need_the_same_rows(panels):
    with pytest.raises(ValueError, match="panels"):
        intervals(panels, xlabel="change")


def test_more_curves_than_colors_differ_in_their_lines():
    panel = {str(index): Curves([0, 1], [[index, index]]) for index in range(9)}
    (ax,) = learning_curves({"many": panel}, ylabel="value").axes
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len(looks) == 9
