"""Tables of a study, in Markdown and CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from recipes.common.compare import SINGLE_TASK, Estimate
from recipes.common.problem import Problem
from recipes.study.statistics import Change, RowSummary, Split
from recipes.study.store import Record

__all__ = ["CAPTION", "markdown_table", "run_row", "summary_row", "write_csv"]

CAPTION = """\
Δm% is the mean relative loss of the metrics against single-task networks, ± one standard error over the seeds; lower is
better. The standard error of the single-task means is left out.

A change is Δm% with the callback minus Δm% without it, paired by seed (same initial weights, same batches); negative is
better. It comes with its bootstrap 95% interval, or with ± one standard error for fewer than four seeds, and with the
number of seeds that gain. An interval that excludes 0 is in bold. *Equal steps* compares after the same number of
optimizer steps, *equal time* after the same CPU time of training, both at the end of the shorter run of the pair. If
the learning rate has a schedule, a slower run has seen less of it at equal time.

Mean rank: over the metrics, among the rows of methods; 1 is the best. Conflict: share of the steps in which the task
with the smallest gradient opposes the mean gradient (Eq. 3), before any teleport. Teleports: accepted of tried, in all
seeds. Time: CPU time of a step relative to the method without the callback."""


def markdown_table(problem: Problem, singles: Mapping[str, Estimate], summaries: Sequence[RowSummary]) -> str:
    """Make the table of one problem, from the metrics of its single-task networks and from its rows."""
    names = problem.higher_is_better
    header = ["method", "callback", "Δm% ↓", "equal steps", "equal time"]
    header += [f"{metric} {'↑' if higher else '↓'}" for metric, higher in names.items()]
    header += ["mean rank", "conflict", "teleports", "time"]
    single = [SINGLE_TASK, "–", "0", "", "", *(f"{estimate.mean:.3f}" for estimate in singles.values()), *[""] * 4]
    rows = [
        [
            summary.variant.method,
            summary.variant.callback or "–",
            _estimate(summary.delta_m),
            _change(summary.same_steps),
            _change(summary.same_time),
            *(f"{summary.metrics[metric].mean:.3f}" for metric in names),
            f"{summary.mean_rank:.1f}",
            "" if math.isnan(summary.conflict) else f"{summary.conflict:.0%}",
            f"{summary.accepted}/{summary.tried}" if summary.variant.callback else "",
            "" if summary.slowdown is None else f"× {summary.slowdown:.2f}",
        ]
        for summary in summaries
    ]
    rule = ["---", "---"] + ["---:"] * (len(header) - 2)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, single, *rows))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows whose columns may differ. A cell without a value is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def summary_row(problem: str, summary: RowSummary) -> dict[str, Any]:
    """A row of the CSV file with one row per method and callback."""
    row: dict[str, Any] = {
        "problem": problem,
        "method": summary.variant.method,
        "callback": summary.variant.callback,
        "delta_m": summary.delta_m.mean,
        "delta_m_se": summary.delta_m.error,
    }
    nothing = dict.fromkeys(field.name for field in fields(Change))
    for name, change in (("equal_steps", summary.same_steps), ("equal_time", summary.same_time)):
        row |= {f"{name}_{field}": value for field, value in (asdict(change) if change else nothing).items()}
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


def run_row(record: Record, split: Split) -> dict[str, Any]:
    """A row of the CSV file with one row per run."""
    spec, measured = record.spec, record.measured
    return {
        **{name: value for name, value in asdict(spec).items() if name != "variant"},
        **asdict(spec.variant),
        **measured.curve(split)[-1].metrics,
        "steps": measured.steps,
        "teleports_tried": len(measured.reports),
        "teleports_accepted": sum(report.accepted for report in measured.reports),
        "seconds": measured.seconds,
        "cpu_seconds": measured.cpu_seconds,
    }


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.mean:.1f}" + ("" if math.isnan(estimate.error) else f" ± {estimate.error:.1f}")


def _change(change: Change | None) -> str:
    if change is None or math.isnan(change.mean):
        return ""
    if math.isnan(change.error):
        return f"{change.mean:+.1f}"
    if math.isnan(change.low):
        return f"{change.mean:+.1f} ± {change.error:.1f} {change.better}/{change.seeds}"
    text = f"{change.mean:+.1f} [{change.low:+.1f}, {change.high:+.1f}] {change.better}/{change.seeds}"
    return f"**{text}**" if change.high < 0 or change.low > 0 else text
