"""Figures of conflict, of teleports, and of training with them, after Fig. 3, 5b and 8 of the paper.

Every function takes a mapping from titles to what their panels show, and returns a :class:`matplotlib.figure.Figure`.
Save it with ``figure.savefig(path)``. In a notebook, a cell that ends with the figure shows it. The figure does not
belong to ``pyplot``, so you need not close it. Only this module needs matplotlib: ``pip install
"lightning-cost[plots]"``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_cost._arguments import check_integer, describe
from lightning_cost._teleport.report import TeleportReport
from lightning_cost.monitor import ConflictSummary

try:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise ImportError(
        'lightning_cost.plots needs matplotlib. Install it with `pip install "lightning-cost[plots]"`.'
    ) from error

__all__ = ["ConflictTrace", "before_after", "conflict_against_loss", "conflict_heat_map", "teleport_trace"]

# The colors of Okabe and Ito, which most color-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_CONFLICT, _CALM, _RESOLVED, _NEUTRAL = "#D55E00", "#0072B2", "#009E73", "#666666"


@dataclass(frozen=True)
class ConflictTrace:
    """The losses and conflicts of one training run, at some of its steps.

    Args:
        steps: Optimizer steps, shape ``(T,)``.
        losses: Mean of the task losses at each step, shape ``(T,)``.
        conflicts: Whether the task gradients conflicted at each step, before any teleport, shape ``(T,)``.
        reports: The teleports of the run.

    Raises:
        TypeError: If a part is no sequence, or holds something else.
        ValueError: If the lengths differ, or are 0.
    """

    steps: Sequence[int]
    losses: Sequence[float]
    conflicts: Sequence[bool]
    reports: Sequence[TeleportReport] = ()

    def __post_init__(self) -> None:
        for name, kinds, what in (
            ("steps", "iu", "integers"),
            ("losses", "iuf", "numbers"),
            ("conflicts", "b", "bools"),
        ):
            value = getattr(self, name)
            array = _array(value)
            if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
                raise TypeError(f"`{name}` must be a sequence of {what}; got {describe(value)}.")
        _check_reports("reports", self.reports)
        lengths = {"steps": len(self.steps), "losses": len(self.losses), "conflicts": len(self.conflicts)}
        if len(set(lengths.values())) > 1 or not lengths["steps"]:
            raise ValueError(f"ConflictTrace needs the same number of entries in each, at least one; got {lengths}.")


def conflict_heat_map(summaries: Mapping[str, ConflictSummary], columns: int = 2) -> Figure:
    r"""Draw which tasks conflict with which, from what :class:`~lightning_cost.monitor.ConflictMonitor` measured.

    A color is the mean cosine :math:`\cos \phi_{ij}` of the gradients of two tasks: blue where they agree, red where
    they conflict. The last column is the cosine :math:`\cos \phi_{i0}` with the mean gradient. The number is the share
    of the measured steps with a negative cosine.

    Args:
        summaries: Summaries, by the title of their panel.
        columns: Panels per row.

    Raises:
        TypeError: If something else is in ``summaries``.
        ValueError: If there is no summary, or one of no steps, or if ``columns`` is below 1.
    """
    check_integer("columns", columns, 1)
    _check_panels("summaries", summaries)
    for title, summary in summaries.items():
        if not isinstance(summary, ConflictSummary):
            raise TypeError(
                f"`summaries[{title!r}]` must be a ConflictSummary, such as `monitor.summary`; got {describe(summary)}"
                f" of type {type(summary).__name__}."
            )
        if not summary.steps:
            raise ValueError(f"`summaries[{title!r}]` is of no steps, so there is nothing to draw. Train first.")
    columns = min(columns, len(summaries))
    rows, side = math.ceil(len(summaries) / columns), max(2.2, 0.42 * max(len(s.norms) for s in summaries.values()))
    figure = _figure(columns, rows, width=side + 2.2, height=side + 1.2)
    for index, (title, summary) in enumerate(summaries.items()):
        ax = figure.add_subplot(rows, columns, index + 1)
        _draw_heat_map(ax, summary)
        ax.set_title(title)
    return figure


def teleport_trace(reports: Mapping[str, TeleportReport]) -> Figure:
    r"""Draw what happened within teleports, one column per teleport (Fig. 5b of the paper).

    A :class:`~lightning_cost.searches.PenaltySearch` shows the loss fluctuation :math:`\mathcal L_t` (Eq. 7) and the
    objective :math:`\mathcal L_g` over its iterations. Any other search shows the drift of the losses and the objective
    at the start, after each step and at each candidate. Where they were not evaluated, there is no point.

    Args:
        reports: Reports of teleports, by the title of their column. Only the last few reports of a callback have a
            trace.

    Raises:
        ValueError: If there is no report, or one without a trace.
    """
    _check_panels("reports", reports)
    for title, report in reports.items():
        if not isinstance(report, TeleportReport):
            raise TypeError(
                f"`reports[{title!r}]` must be a TeleportReport, such as `callback.reports[-1]`; got {describe(report)}"
                f" of type {type(report).__name__}."
            )
    figure = _figure(len(reports), 2, height=2.3)
    axes = figure.subplots(2, len(reports), squeeze=False, sharex="col")
    for column, (title, report) in enumerate(reports.items()):
        if not report.trace:
            raise ValueError(
                f"The report of {title!r} has no trace, so there is nothing to draw. Only the last few reports of a"
                " callback keep theirs, and checkpoints hold none."
            )
        _draw_trace(axes[0, column], axes[1, column], report.trace)
        axes[0, column].set_title(title)
    for ax in axes.flat:
        _tidy(ax)
    return figure


def before_after(reports: Mapping[str, Sequence[TeleportReport]]) -> Figure:
    r"""Compare cosines and gradient norms before and after accepted teleports, one row per run (Fig. 8 of the paper).

    The left panel shows, for each task, the cosine :math:`\cos \phi_{i0}` of its gradient with the mean gradient. In
    the shaded quarter are the tasks that conflict before the teleport and not after it. The right panel shows the norm
    of the mean gradient. On the diagonal, nothing changes.

    Args:
        reports: The reports of each run, by its title. Refused teleports change nothing, and are left out.

    Raises:
        ValueError: If there is no run, or one without an accepted teleport.
    """
    _check_panels("reports", reports)
    for title, attempts in reports.items():
        _check_reports(f"reports[{title!r}]", attempts)
    figure = _figure(2, len(reports), width=4.2, height=4.0)
    axes = figure.subplots(len(reports), 2, squeeze=False)
    for (left, right), (title, attempts) in zip(axes, reports.items(), strict=True):
        accepted = [report for report in attempts if report.accepted and report.cosines_after]
        if not accepted:
            raise ValueError(
                f"Of the {len(attempts)} teleports of {title!r}, none was accepted and checked afterwards: nothing to"
                " compare."
            )
        _draw_cosines(left, accepted)
        left.set_title(f"{title}: cosines")
        right.set(xscale="log", yscale="log", title=f"{title}: gradient norms")
        pairs = [(r.grad_norm_before, r.grad_norm_after) for r in accepted if r.grad_norm_after is not None]
        right.plot(*zip(*pairs, strict=True), "o", color=_NEUTRAL, **_POINTS)
        _diagonal(right)
        right.set(xlabel="norm of the mean gradient, before", ylabel="after")
        for ax in (left, right):
            _tidy(ax)
        for axis in (right.xaxis, right.yaxis):
            _log_ticks(axis)
    return figure


def conflict_against_loss(runs: Mapping[str, ConflictTrace], columns: int = 2) -> Figure:
    """Draw the mean loss during training, colored by conflict, with the teleports (after Fig. 3 of the paper).

    Args:
        runs: Losses and conflicts of each run, by its title. Panels in one row share their axes.
        columns: Panels per row.

    Raises:
        ValueError: If there is no run, or ``columns`` is below 1.
    """
    check_integer("columns", columns, 1)
    _check_panels("runs", runs)
    for title, run in runs.items():
        if not isinstance(run, ConflictTrace):
            raise TypeError(
                f"`runs[{title!r}]` must be a ConflictTrace; got {describe(run)} of type {type(run).__name__}."
            )
        if (_array(run.losses) <= 0).any():
            raise ValueError(
                f"`runs[{title!r}].losses` must be positive, because their axis is logarithmic; the least is"
                f" {min(run.losses):g}. Add a constant to all of them."
            )
    figure, axes = _panels(runs, columns)
    for ax, (title, run) in zip(axes, runs.items(), strict=True):
        steps, losses, conflicts = (_array(part) for part in (run.steps, run.losses, run.conflicts))
        for flag, label, color in ((False, "no conflict", _CALM), (True, "conflict", _CONFLICT)):
            chosen = conflicts == flag
            ax.plot(steps[chosen], losses[chosen], "o", color=color, label=f"{label} ({chosen.mean():.0%})", **_POINTS)
        for accepted, label, color in ((True, "accepted", "#000000"), (False, "refused", "#CC79A7")):
            at = [report.step for report in run.reports if report.accepted == accepted]
            if at:
                # At the lower edge, whatever the losses are. The margin keeps the losses out of it.
                ax.plot(
                    at,
                    [0.03] * len(at),
                    "|",
                    color=color,
                    markersize=7,
                    markeredgewidth=0.7,
                    label=f"teleport {label} ({len(at)})",
                    transform=ax.get_xaxis_transform(),
                )
        ax.set_yscale("log")
        ax.margins(y=0.12)
        ax.set_title(title)
        ax.legend(loc="upper right")
    for ax in axes:
        _log_ticks(ax.yaxis)
    _label_outside(axes, "step", "mean of the task losses")
    return figure


_POINTS: dict[str, Any] = {"markersize": 4, "alpha": 0.6, "markeredgewidth": 0}


def _draw_heat_map(ax: Axes, summary: ConflictSummary) -> None:
    tasks = list(summary.norms)
    values, shares = np.full((2, len(tasks), len(tasks) + 1), np.nan)
    for i, task in enumerate(tasks):
        values[i, -1], shares[i, -1] = summary.cosines[task], summary.conflicts[task]
    for (left, right), cosine in summary.pairwise_cosines.items():
        i, j = tasks.index(left), tasks.index(right)
        values[i, j] = values[j, i] = cosine
        shares[i, j] = shares[j, i] = summary.pairwise_conflicts[left, right]
    ax.pcolormesh(values, cmap="RdBu", vmin=-1, vmax=1, edgecolors="white", linewidth=1.5)
    for (i, j), share in np.ndenumerate(shares):
        if not np.isnan(share):
            color = "white" if abs(values[i, j]) > 0.6 else "black"
            ax.text(j + 0.5, i + 0.5, f"{share:.0%}", ha="center", va="center", fontsize=8, color=color)
    ax.set_xticks(np.arange(len(tasks) + 1) + 0.5, [*tasks, "mean"], rotation=90 if len(tasks) > 4 else 0)
    ax.set_yticks(np.arange(len(tasks)) + 0.5, tasks)
    ax.axvline(len(tasks), color="white", linewidth=6)
    ax.invert_yaxis()
    ax.set_aspect("equal")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _draw_trace(top: Axes, bottom: Axes, trace: Sequence[Mapping[str, Any]]) -> None:
    iterations = [row for row in trace if "loss_fluctuation" in row]
    if iterations:
        _line(top, [row["loss_fluctuation"] for row in iterations], _CALM)
        _line(bottom, [row.get("objective") for row in iterations], _CONFLICT)
        top.set_ylabel(r"loss fluctuation $\mathcal{L}_t$")
        bottom.set_ylabel(r"objective $\mathcal{L}_g$")
        bottom.set_xlabel("iteration")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    _line(top, [row.get("drift") for row in trace], _CALM, marker="o")
    _line(bottom, [row.get("objective") for row in trace], _CONFLICT, marker="o")
    top.set_ylabel("drift of the losses")
    bottom.set_ylabel("objective")
    bottom.set_xlabel("evaluation")
    bottom.set_xticks(range(len(trace)), [row.get("stage", "") for row in trace])


def _line(ax: Axes, values: Sequence[float | None], color: str, marker: str | None = None) -> None:
    """Draw a line through the values, skipping those that are ``None``."""
    points = [(index, value) for index, value in enumerate(values) if value is not None]
    ax.plot([index for index, _ in points], [value for _, value in points], color=color, marker=marker)


def _draw_cosines(ax: Axes, accepted: Sequence[TeleportReport]) -> None:
    resolved = conflicts = 0
    # A task without labels in a step is missing in its report.
    tasks = dict.fromkeys(task for report in accepted for task in report.cosines_before)
    for task, color in zip(tasks, _cycle(tasks), strict=True):
        there = [report for report in accepted if task in report.cosines_before and task in report.cosines_after]
        before = [report.cosines_before[task] for report in there]
        after = [report.cosines_after[task] for report in there]
        ax.plot(before, after, "o", color=color, label=task, **_POINTS)
        conflicts += sum(cosine < 0 for cosine in before)
        resolved += sum(was < 0 <= now for was, now in zip(before, after, strict=True))
    _diagonal(ax)
    low, high = ax.get_xlim()
    ax.fill_between([low, 0], 0, high, color=_RESOLVED, alpha=0.08, linewidth=0, zorder=0)
    ax.text(
        0.03, 0.97, f"{resolved} of {conflicts}\nconflicts resolved", transform=ax.transAxes, va="top", color=_RESOLVED
    )
    ax.axhline(0, color=_NEUTRAL, linewidth=0.8, zorder=0)
    ax.axvline(0, color=_NEUTRAL, linewidth=0.8, zorder=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.set(xlabel="cosine with the mean gradient, before", ylabel="after")
    ax.legend(loc="lower right")


def _diagonal(ax: Axes) -> None:
    """Set equal limits on both axes, and draw the line on which nothing changes."""
    low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.plot([low, high], [low, high], "--", color=_NEUTRAL, linewidth=0.8, zorder=0)


def _panels(panels: Mapping[str, object], columns: int) -> tuple[Figure, list[Axes]]:
    """Make a figure with one Axes per panel. Where the last row has no panel, there is no Axes."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(columns, rows)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex="row", sharey="row").flat)
    for ax in axes[: len(panels)]:
        _tidy(ax)
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure, axes[: len(panels)]


def _label_outside(axes: Sequence[Axes], xlabel: str, ylabel: str) -> None:
    """Label each axis once: at the left end of every row, and below the last panel of every column."""
    places = {(spec.rowspan.start, spec.colspan.start): ax for ax in axes if (spec := ax.get_subplotspec())}
    for (row, column), ax in places.items():
        if column == 0:
            ax.set_ylabel(ylabel)
        if (row + 1, column) not in places:
            ax.set_xlabel(xlabel)


def _figure(columns: int, rows: int, width: float = 3.9, height: float = 3.1) -> Figure:
    return Figure(figsize=(width * columns, height * rows), dpi=150, layout="constrained")


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"


def _log_ticks(axis: Axis) -> None:
    """Put plain numbers at round places, whether the axis spans decades or a few percent."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)


def _cycle(names: Mapping[str, object]) -> list[str]:
    return [_COLORS[index % len(_COLORS)] for index in range(len(names))]


def _array(values: object) -> NDArray[Any]:
    """An array of a sequence; of no dimension if it is none."""
    if isinstance(values, Tensor):
        return np.asarray(values.detach().cpu())
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return np.asarray(None)


def _check_reports(argument: str, reports: object) -> None:
    if not isinstance(reports, Sequence) or not all(isinstance(report, TeleportReport) for report in reports):
        raise TypeError(
            f"`{argument}` must be a sequence of TeleportReport, such as `callback.reports`; got {describe(reports)} of"
            f" type {type(reports).__name__}."
        )


def _check_panels(argument: str, panels: Mapping[str, object]) -> None:
    if not isinstance(panels, Mapping) or not panels:
        raise ValueError(
            f"`{argument}` must map at least one title to the content of its panel; got {describe(panels)}."
        )
