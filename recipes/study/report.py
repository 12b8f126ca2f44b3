"""Tables of a study: Markdown to read, CSV to compute with."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.common.compare import Estimate
from recipes.common.problem import Problem
from recipes.study.statistics import Change, RowSummary

__all__ = ["CAPTION", "markdown_table", "write_csv"]

CAPTION = """\
Δm% is the mean relative loss of the metrics against single-task networks, ± one standard error over the seeds; lower is
better. A change is that of Δm% by the callback, seed by seed against the method without it (same initial weights, same
batches), with its bootstrap 95% interval and the number of seeds in which it is a gain: *equal steps* after as many
optimizer steps, *equal time* after as much CPU time of training, both at the end of the shorter run of the pair. An
interval that excludes 0 is in bold. Where the learning rate has a schedule, a slower run has seen less of it at equal
time. Conflict: share of the steps in which the task with the smallest gradient opposes
the mean gradient (Eq. 3), before any teleport. Teleports: accepted of those tried, in all seeds. Time: CPU time of a
step relative to the method without the callback."""


def markdown_table(problem: Problem, summaries: Sequence[RowSummary]) -> str:
    """The rows of one problem.

    Args:
        problem: The problem.
        summaries: Its rows.
    """
    header = [
        "method",
        "callback",
        "Δm% ↓",
        "equal steps",
        "equal time",
        *(f"{metric} {'↑' if higher else '↓'}" for metric, higher in problem.higher_is_better.items()),
        "mean rank",
        "conflict",
        "teleports",
        "time",
    ]
    rows = [
        [
            summary.variant.method,
            summary.variant.callback or "–",
            _estimate(summary.delta_m),
            _change(summary.same_steps),
            _change(summary.same_time),
            *(f"{summary.metrics[metric].mean:.3f}" for metric in problem.higher_is_better),
            f"{summary.mean_rank:.1f}",
            "" if math.isnan(summary.conflict) else f"{summary.conflict:.0%}",
            f"{summary.accepted}/{summary.tried}" if summary.variant.callback else "",
            "" if summary.slowdown is None else f"× {summary.slowdown:.2f}",
        ]
        for summary in summaries
    ]
    rule = ["---", "---"] + ["---:"] * (len(header) - 2)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows whose columns may differ; a cell that has no value is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def summary_row(summary: RowSummary) -> dict[str, Any]:
    """A row of `summary.csv`."""
    row: dict[str, Any] = {
        "problem": summary.problem,
        "method": summary.variant.method,
        "callback": summary.variant.callback,
        "delta_m": summary.delta_m.mean,
        "delta_m_se": summary.delta_m.error,
    }
    for name, change in (("equal_steps", summary.same_steps), ("equal_time", summary.same_time)):
        fields = asdict(change) if change is not None else dict.fromkeys(("mean", "low", "high", "better", "seeds"))
        row |= {f"{name}_{field}": value for field, value in fields.items()}
    for metric, estimate in summary.metrics.items():
        row |= {metric: estimate.mean, f"{metric}_se": estimate.error}
    return row | {
        "mean_rank": summary.mean_rank,
        "conflict_share": summary.conflict,
        "teleports_tried": summary.tried,
        "teleports_accepted": summary.accepted,
        "milliseconds_a_step": summary.milliseconds,
        "time_ratio": summary.slowdown,
    }


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.mean:.1f}" + ("" if math.isnan(estimate.error) else f" ± {estimate.error:.1f}")


def _change(change: Change | None) -> str:
    if change is None or math.isnan(change.mean):
        return ""
    if math.isnan(change.low):
        return f"{change.mean:+.1f}"
    text = f"{change.mean:+.1f} [{change.low:+.1f}, {change.high:+.1f}] {change.better}/{change.seeds}"
    return f"**{text}**" if change.high < 0 or change.low > 0 else text
