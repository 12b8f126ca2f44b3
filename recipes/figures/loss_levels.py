"""Fig. 3: conflict against loss. Is there a point without conflict at the loss of one with conflict?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from lightning_cost import TeleportReport
from recipes.common.training import Look, Measured
from recipes.figures.request import Request, markdown, measure
from recipes.study.plots import STYLE, panel_grid
from recipes.study.problem import find_problem
from recipes.study.report import write_csv

__all__ = ["TOLERANCE", "Levels", "draw_loss_levels", "loss_levels"]

TOLERANCE = 0.02
"""Losses whose ratio is at most 1 + this count as the same."""
_CONFLICT, _CALM, _POINT, _JUMP = "#CC79A7", "#009E73", "#0072B2", "#D55E00"
_MOST_JUMPS = 15


@dataclass(frozen=True)
class Levels:
    """The points of a method along training, and the teleports of runs with COST.

    Attributes:
        looks: Points of all seeds, in any order.
        reports: Teleports that were tried, in other runs of the same method.
    """

    looks: Sequence[Look]
    reports: Sequence[TeleportReport] = ()

    def matched(self, each_task: bool) -> float:
        """Share of the points with conflict for which some point without has the same loss; NaN without conflict.

        Args:
            each_task: Whether the loss of each task must be the same. Otherwise the mean of them must be.
        """
        losses = np.log([list(look.losses.values()) if each_task else [_mean(look.losses)] for look in self.looks])
        conflict = np.array([look.cosine < 0 for look in self.looks])
        if not conflict.any():
            return float("nan")
        distances = np.abs(losses[conflict][:, None] - losses[~conflict][None]).max(axis=-1)
        return float((distances <= np.log1p(TOLERANCE)).any(axis=1).mean())


def draw_loss_levels(request: Request, console: Console) -> Iterator[tuple[str, Path]]:
    """Train every method with and without COST, and yield what each written file shows, and the file."""
    panels: dict[str, Levels] = {}
    table, points = [], []
    rows = list(measure(request, ["", "COST"], console).items())
    for (row, plain), (_, with_cost) in zip(rows[::2], rows[1::2], strict=True):
        problem = find_problem(row.problem)
        title = row.variant.method if len(request.problems) == 1 else f"{problem.title}: {row.variant.method}"
        levels = panels[title] = Levels(_looks(plain), [report for run in with_cost for report in run.reports])
        table.append([title, *_cells(plain, levels)])
        points += [
            {"problem": row.problem, "method": row.variant.method, "seed": seed, "step": look.step}
            | {"cosine": look.cosine, "mean_loss": _mean(look.losses), **look.losses}
            for seed, run in zip(request.seeds, plain, strict=True)
            for look in run.looks
        ]

    head = [
        "method",
        "steps",
        "with conflict",
        "matched in the mean loss",
        "matched in each loss",
        "teleports accepted",
    ]
    text = markdown([*head, "resolved"], table)
    console.print(Markdown(text))
    path = request.output / "loss_levels.md"
    path.write_text(text, encoding="utf-8")
    yield "conflicts that have a point without conflict at the same loss, and teleports", path
    path = request.output / "loss_levels.csv"
    write_csv(path, points)
    yield "one row per point", path
    path = request.output / "loss_levels.png"
    loss_levels(panels).savefig(path)
    yield "conflict against loss, with some teleports (Fig. 3)", path


@mpl.rc_context(STYLE)
def loss_levels(panels: Mapping[str, Levels], columns: int = 3) -> Figure:
    """Draw the lowest cosine of a task with the mean against the mean loss, with some accepted teleports.

    Args:
        panels: Title of the panel to its points and teleports.
        columns: Panels per row.
    """
    shown = {title: levels.looks for title, levels in panels.items()}
    figure, axes = panel_grid(shown, columns, 3.1, "mean of the task losses", "lowest cosine with the mean gradient")
    for ax, levels in zip(axes, panels.values(), strict=True):
        ax.axhspan(-1, 0, color=_CONFLICT, alpha=0.15, linewidth=0, zorder=0)
        ax.axhspan(0, 1, color=_CALM, alpha=0.1, linewidth=0, zorder=0)
        losses, cosines = [_mean(look.losses) for look in levels.looks], [look.cosine for look in levels.looks]
        ax.plot(losses, cosines, "o", color=_POINT, markersize=3, alpha=0.5, markeredgewidth=0)
        accepted = [report for report in levels.reports if report.accepted and report.cosines_after]
        for report in accepted[:: max(1, len(accepted) // _MOST_JUMPS)][:_MOST_JUMPS]:
            ends = [_mean(report.losses_before), _mean(report.losses_after)]
            lowest = [min(report.cosines_before.values()), min(report.cosines_after.values())]
            ax.plot(ends, lowest, "--", color=_JUMP, linewidth=0.9)
        ax.set_xscale("log")
    for ax, title in zip(axes, panels, strict=True):
        ax.set_title(title)
        ax.set_ylim(-1, 1)
    return figure


def _cells(runs: Sequence[Measured], levels: Levels) -> Iterator[str]:
    shares = [sum(look.cosine < 0 for look in run.looks) / len(run.looks) for run in runs]
    yield str(len(levels.looks))
    yield f"{statistics.fmean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"
    for each_task in (False, True):
        yield f"{levels.matched(each_task):.0%}"
    accepted = sum(report.accepted for report in levels.reports)
    yield f"{accepted}/{len(levels.reports)}"
    yield f"{sum(report.resolved for report in levels.reports) / accepted:.0%}" if accepted else "–"


def _looks(runs: Sequence[Measured]) -> list[Look]:
    return [look for run in runs for look in run.looks]


def _mean(losses: Mapping[str, float]) -> float:
    return statistics.fmean(losses.values())
