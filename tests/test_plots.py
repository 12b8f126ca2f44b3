"""Figures: what the artists hold is what was given."""

import importlib
import sys
from dataclasses import replace

import pytest

from lightning_cost import ConflictSummary, TeleportReport
from lightning_cost.plots import (
    ConflictTrace,
    before_after,
    conflict_against_loss,
    conflict_heat_map,
    teleport_trace,
)


def make_report(step=0, accepted=True, trace=(), before=(0.9, -0.3), after=(0.8, 0.1), norms=(2.0, 3.0)):
    def by_task(values):
        return dict(zip(("left", "right"), values, strict=True))

    return TeleportReport(
        step=step,
        epoch=0,
        accepted=accepted,
        reason="",
        losses_before=by_task((1.0, 2.0)),
        losses_after=by_task((1.0, 2.0)),
        cosines_before=by_task(before),
        cosines_after=by_task(after),
        grad_norm_before=norms[0],
        grad_norm_after=norms[1],
        sigma=0.0,
        drift=0.0,
        seconds=0.1,
        forwards=3,
        backwards=5,
        trace=list(trace),
    )


LEVEL_SET = [
    {"stage": "start", "losses": [1.0, 2.0], "drift": 0.0, "objective": -0.3},
    {"stage": "step", "losses": [1.1, 2.0], "drift": 0.1},
    {"stage": "candidate", "losses": [1.05, 2.0], "drift": 0.05},
    {"stage": "step", "losses": [1.02, 2.0], "drift": 0.02},
    {"stage": "candidate", "losses": [1.01, 2.0], "drift": 0.01, "objective": 0.1},
]
PENALTY = [
    {"stage": "start", "losses": [1.0, 2.0], "drift": 0.0, "objective": 7.0},
    {"stage": "search", "losses": [1.0, 2.0], "loss_fluctuation": 0.0, "objective": 7.1},
    {"stage": "search", "losses": [1.1, 2.2], "loss_fluctuation": 0.15, "objective": 7.5},
    {"stage": "search", "losses": [1.0, 2.1], "loss_fluctuation": 0.05, "objective": 7.3},
    {"stage": "candidate", "losses": [1.0, 2.1], "drift": 0.05, "objective": 7.2},
]


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


class TestTeleportTrace:
    def test_a_penalty_search_shows_both_terms_over_its_iterations(self):
        figure = drawn(teleport_trace({"penalty": make_report(trace=PENALTY)}))
        top, bottom = figure.axes
        assert points(top.get_lines()[0]) == [(0, 0.0), (1, 0.15), (2, 0.05)]
        assert points(bottom.get_lines()[0]) == [(0, 7.1), (1, 7.5), (2, 7.3)]
        assert titles(figure) == ["penalty"]

    def test_another_search_shows_every_evaluation(self):
        figure = drawn(teleport_trace({"level set": make_report(trace=LEVEL_SET)}))
        top, bottom = figure.axes
        assert points(top.get_lines()[0]) == [(0, 0.0), (1, 0.1), (2, 0.05), (3, 0.02), (4, 0.01)]
        assert points(bottom.get_lines()[0]) == [(0, -0.3), (4, 0.1)]  # The others have no objective.
        assert [label.get_text() for label in bottom.get_xticklabels()] == [row["stage"] for row in LEVEL_SET]

    def test_one_column_a_report(self):
        reports = {"a": make_report(trace=PENALTY), "b": make_report(trace=LEVEL_SET), "c": make_report(trace=PENALTY)}
        figure = drawn(teleport_trace(reports))
        assert titles(figure) == ["a", "b", "c"]
        assert [ax.get_subplotspec().colspan.start for ax in figure.axes if ax.get_title()] == [0, 1, 2]

    def test_an_objective_without_a_value_leaves_a_gap(self):
        trace = [{**row, "objective": None} for row in LEVEL_SET]
        figure = drawn(teleport_trace({"random direction": make_report(trace=trace)}))
        assert points(figure.axes[1].get_lines()[0]) == []

    def test_a_report_without_trace_is_refused(self):
        with pytest.raises(ValueError, match="'empty' has no trace"):
            teleport_trace({"empty": make_report()})


class TestBeforeAfter:
    def test_points_are_those_of_the_accepted_teleports(self):
        reports = [
            make_report(before=(0.9, -0.3), after=(0.8, 0.1), norms=(2.0, 3.0)),
            make_report(accepted=False, before=(0.7, -0.9), after=(0.7, -0.9), norms=(9.0, 9.0)),
            make_report(before=(0.5, -0.2), after=(0.6, -0.1), norms=(1.0, 0.5)),
        ]
        figure = drawn(before_after({"run": reports}))
        cosines, norms = figure.axes
        assert labelled(cosines) == {"left": [(0.9, 0.8), (0.5, 0.6)], "right": [(-0.3, 0.1), (-0.2, -0.1)]}
        assert (2.0, 3.0) in points(norms.get_lines()[0])
        assert points(norms.get_lines()[0]) == [(2.0, 3.0), (1.0, 0.5)]

    def test_both_axes_of_a_panel_have_the_same_limits_so_that_the_diagonal_means_no_change(self):
        figure = drawn(before_after({"run": [make_report()]}))
        for ax in figure.axes:
            assert ax.get_xlim() == ax.get_ylim()

    def test_a_row_a_run(self):
        figure = drawn(before_after({"first": [make_report()], "second": [make_report(norms=(5.0, 6.0))]}))
        assert [ax.get_subplotspec().rowspan.start for ax in figure.axes] == [0, 0, 1, 1]
        assert points(figure.axes[3].get_lines()[0]) == [(5.0, 6.0)]

    def test_without_an_accepted_teleport_there_is_nothing_to_compare(self):
        with pytest.raises(ValueError, match="Of the 1 teleports of 'run', none was accepted"):
            before_after({"run": [make_report(accepted=False)]})


class TestConflictAgainstLoss:
    RUN = ConflictTrace([0, 10, 20, 30], [4.0, 2.0, 1.0, 0.5], [True, False, True, False])

    def test_points_are_colored_by_conflict(self):
        figure = drawn(conflict_against_loss({"run": self.RUN}))
        lines = labelled(figure.axes[0])
        assert lines == {"conflict": [(0, 4.0), (20, 1.0)], "no conflict": [(10, 2.0), (30, 0.5)]}
        colors = {line.get_color() for line in figure.axes[0].get_lines()}
        assert len(colors) == 2

    def test_teleports_are_marked_where_they_happened(self):
        reports = [make_report(step=12), make_report(step=20, accepted=False), make_report(step=27)]
        figure = drawn(conflict_against_loss({"run": replace(self.RUN, reports=reports)}))
        lines = labelled(figure.axes[0])
        assert [x for x, _ in lines["teleport accepted"]] == [12, 27]
        assert [x for x, _ in lines["teleport refused"]] == [20]

    def test_the_legend_counts(self):
        figure = drawn(conflict_against_loss({"run": replace(self.RUN, reports=[make_report(step=12)])}))
        legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert legend == ["no conflict (50%)", "conflict (50%)", "teleport accepted (1)"]

    def test_entries_must_match(self):
        with pytest.raises(ValueError, match="'losses': 1"):
            ConflictTrace([0, 1], [1.0], [True, False])
        with pytest.raises(ValueError, match="at least one"):
            ConflictTrace([], [], [])


@pytest.mark.parametrize(
    ("draw", "argument"),
    [
        (teleport_trace, "reports"),
        (before_after, "reports"),
        (conflict_against_loss, "runs"),
    ],
)
def test_no_panel_is_an_error_that_names_the_argument(draw, argument):
    with pytest.raises(ValueError, match=f"`{argument}` must map at least one title"):
        draw({})


def test_no_column_is_an_error():
    with pytest.raises(ValueError, match="`columns` must be an integer of at least 1; got 0"):
        conflict_against_loss({"run": TestConflictAgainstLoss.RUN}, columns=0)


def test_figures_stay_out_of_pyplot():
    """Else a program that draws many would keep them all."""
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    teleport_trace({"a": make_report(trace=PENALTY)})
    assert pyplot.get_fignums() == before


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "lightning_cost.plots")
    with pytest.raises(ImportError, match=r'lightning_cost\.plots needs matplotlib.*"lightning-cost\[plots\]"'):
        importlib.import_module("lightning_cost.plots")


SUMMARY = ConflictSummary(
    steps=8,
    skipped=0,
    norms={"left": 1.0, "right": 2.0, "ink": 0.5},
    cosines={"left": 0.5, "right": 0.9, "ink": -0.25},
    conflicts={"left": 0.125, "right": 0.0, "ink": 0.75},
    pairwise_cosines={("left", "right"): 0.2, ("left", "ink"): -0.7, ("right", "ink"): -0.1},
    pairwise_conflicts={("left", "right"): 0.25, ("left", "ink"): 1.0, ("right", "ink"): 0.5},
    dominated=0.75,
    weak=1.0,
    mean_norm=0.8,
    pareto_stationarity=0.3,
)


def test_a_heat_map_has_every_pair_twice_and_the_mean_last():
    figure = drawn(conflict_heat_map({"LS": SUMMARY, "UPGrad": SUMMARY}))
    assert titles(figure) == ["LS", "UPGrad"]
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["left", "right", "ink", "mean"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["left", "right", "ink"]
    texts = {(t.get_position()[1] - 0.5, t.get_position()[0] - 0.5): t.get_text() for t in ax.texts}
    assert texts == {
        (0, 1): "25%",
        (1, 0): "25%",
        (0, 2): "100%",
        (2, 0): "100%",
        (1, 2): "50%",
        (2, 1): "50%",
        (0, 3): "12%",
        (1, 3): "0%",
        (2, 3): "75%",
    }
    values = ax.collections[0].get_array()
    assert values[0, 2] == values[2, 0] == -0.7
    assert values[2, 3] == -0.25
    assert [bool(values.mask[i, i]) for i in range(3)] == [True] * 3


def test_a_heat_map_refuses_what_is_no_summary():
    with pytest.raises(TypeError, match="summaries\\['LS'\\]"):
        conflict_heat_map({"LS": "summary"})
    with pytest.raises(ValueError, match="no steps"):
        conflict_heat_map({"LS": replace(SUMMARY, steps=0)})
    with pytest.raises(ValueError, match="columns"):
        conflict_heat_map({"LS": SUMMARY}, columns=0)
