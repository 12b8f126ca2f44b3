"""Fig. 10: Δm% and time as Eq. 4 asks for fewer tasks in conflict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from recipes.common.compare import Variant
from recipes.figures.request import Request
from recipes.study import Row, Study
from recipes.study.plots import STYLE
from recipes.study.problem import find_problem
from recipes.study.report import write_csv
from recipes.study.statistics import Change, RowSummary, delta_m_curves, group

__all__ = ["THRESHOLDS", "Threshold", "draw_relaxed_trigger", "needed_tasks", "relaxed_trigger"]

THRESHOLDS = {"majority 0.5": 0.5, "majority 0.3": 0.3, "majority 0.15": 0.15, "any": 0.0}
"""Callback of a study to the share of the tasks that must conflict with the mean; with 0 one task is enough."""
_COLORS = ("#0072B2", "#D55E00")


@dataclass(frozen=True)
class Threshold:
    """What a share in Eq. 4 gives, relative to the method without teleports.

    Attributes:
        share: Share of the tasks that must conflict.
        same_steps: Change of Δm% at equal steps.
        same_time: Change of Δm% at equal time.
        slowdowns: Time of a step, one number per seed.
        tried: Teleports tried, in all seeds.
    """

    share: float
    same_steps: Change
    same_time: Change
    slowdowns: Sequence[float]
    tried: int


def draw_relaxed_trigger(request: Request, console: Console) -> Iterator[tuple[str, Path]]:
    """Run the study, and yield what each written file shows, and the file.

    Raises:
        ValueError: If two thresholds ask for the same number of tasks, because a problem has too few.
    """
    needed = {problem: needed_tasks(problem) for problem in request.problems}
    rows = [
        Row(problem, Variant(method, callback))
        for problem in request.problems
        for method in request.methods
        for callback in ("", *THRESHOLDS)
    ]
    title = "Δm% and time as fewer tasks must conflict (Fig. 10)"
    study = Study(rows, request.output, request.seeds, request.epochs, title)
    study.run(request.jobs, console)
    results = study.results()
    console.print(Markdown(results.markdown()))

    panels: dict[str, list[Threshold]] = {}
    for problem, summaries in results.summaries.items():
        paces = {
            variant: [curve.pace for curve in of_seeds.values()]
            for variant, of_seeds in delta_m_curves(
                find_problem(problem), group(results.records[problem]), results.split
            ).items()
        }
        for row in summaries:
            if row.variant.callback:
                heading = f"{find_problem(problem).title}: {row.variant.method}"
                share = needed[problem][row.variant.callback] / len(find_problem(problem).tasks)
                panels.setdefault(heading, []).append(_threshold(share, row, paces))
    path = request.output / "relaxed_trigger.csv"
    write_csv(
        path,
        [
            {"panel": heading, "share": point.share, "tried": point.tried}
            | {f"same_steps_{name}": getattr(point.same_steps, name) for name in ("mean", "low", "high", "better")}
            | {f"same_time_{name}": getattr(point.same_time, name) for name in ("mean", "low", "high", "better")}
            | {f"slowdown_{seed}": value for seed, value in zip(request.seeds, point.slowdowns, strict=True)}
            for heading, points in panels.items()
            for point in points
        ],
    )
    yield "changes of Δm% and times, one row per threshold", path
    path = request.output / "relaxed_trigger.png"
    relaxed_trigger(panels).savefig(path)
    yield "Δm% and time against the threshold (Fig. 10)", path


@mpl.rc_context(STYLE)
def relaxed_trigger(panels: Mapping[str, Sequence[Threshold]]) -> Figure:
    """Draw the change of Δm% with its interval, and beside it the time of a step, against the share of Eq. 4.

    Args:
        panels: Title of a method to its thresholds. The axis is reversed: Eq. 4 is relaxed from left to right.
    """
    figure = Figure(figsize=(8, 3.1 * len(panels)), dpi=150, layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (left, right), (title, points) in zip(grid, panels.items(), strict=True):
        shares = [point.share for point in points]
        for color, label, changes, shift in (
            (_COLORS[0], "equal steps", [point.same_steps for point in points], -0.006),
            (_COLORS[1], "equal time", [point.same_time for point in points], 0.006),
        ):
            places = [share + shift for share in shares]
            left.plot(places, [change.mean for change in changes], "o-", color=color, label=label)
            left.vlines(places, [c.low for c in changes], [c.high for c in changes], color=color, linewidth=1.2)
        left.axhline(0, color="#666666", linewidth=0.8, zorder=0)
        left.set(title=title, ylabel="change of Δm%")
        times = [point.slowdowns for point in points]
        right.plot(shares, [sum(of_seeds) / len(of_seeds) for of_seeds in times], "o-", color=_COLORS[0])
        right.fill_between(shares, [min(t) for t in times], [max(t) for t in times], alpha=0.18, linewidth=0)
        right.set(title=f"{title}, time", ylabel="time of a step, relative to no teleports")
        left.legend()
        for ax in (left, right):
            ax.set_xlabel("share of the tasks that must conflict")
            ax.invert_xaxis()
    return figure


def needed_tasks(problem: str) -> dict[str, int]:
    """Callback to the number of tasks that must conflict, as `Majority` counts them.

    Raises:
        ValueError: If two callbacks ask for the same number.
    """
    tasks = len(find_problem(problem).tasks)
    needed = {name: max(1, math.ceil(share * tasks - 1e-9)) for name, share in THRESHOLDS.items()}
    if len(set(needed.values())) < len(needed):
        raise ValueError(
            f"problem={problem!r} has {tasks} tasks, too few to tell the thresholds of Eq. 4 apart: they ask for"
            f" {list(needed.values())} of them. Take one with 7 tasks or more, such as digits:many."
        )
    return needed


def _threshold(share: float, row: RowSummary, paces: Mapping[Variant, Sequence[float]]) -> Threshold:
    assert row.same_steps is not None
    assert row.same_time is not None
    pairs = zip(paces[row.variant], paces[row.variant.plain], strict=True)
    return Threshold(share, row.same_steps, row.same_time, [a / b for a, b in pairs], row.tried)
