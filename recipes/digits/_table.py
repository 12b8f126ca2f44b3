"""The tables of the demo, and what to read out of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table
from scipy.stats import t as student_t

from recipes.common.compare import SINGLE_TASK, Estimate, Run, Summary, baselines
from recipes.digits._runs import PROBLEMS

__all__ = ["make_caption", "make_table", "make_title"]


def make_table(name: str, runs: Sequence[Run], summaries: Sequence[Summary]) -> Table:
    """The methods on one problem.

    Args:
        name: Key of `PROBLEMS`.
        runs: The runs of that problem.
        summaries: Its variants.
    """
    problem = PROBLEMS[name]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\nmethod", no_wrap=True)
    for metric, higher in problem.higher_is_better.items():
        task, _, measure = metric.partition("_")
        _add_column(table, f"{task} {'↑' if higher else '↓'}\n{'acc. %' if measure == 'accuracy' else 'MSE'}")
    for header in ("\nΔm% ↓", "change\nby COST", "mean\nrank", "con-\nflict", "tele-\nports", "time\ns"):
        _add_column(table, header)

    singles = baselines(runs)
    seconds = [run.measured.seconds for run in runs if run.variant.method == SINGLE_TASK]
    metrics = [_metric(metric, singles[metric].mean) for metric in problem.higher_is_better]
    table.add_row(SINGLE_TASK, *metrics, "0", "", "", "", "", f"{sum(seconds) / len(seconds):.0f}", end_section=True)
    for summary in summaries:
        cost = bool(summary.variant.callback)
        table.add_row(
            "  + COST" if cost else summary.variant.method,
            *(_metric(metric, summary.metrics[metric].mean) for metric in problem.higher_is_better),
            _estimate(summary.delta_m),
            "" if summary.change is None else f"[bold]{_estimate(summary.change, sign='+')}[/bold]",
            f"{summary.mean_rank:.1f}",
            f"{summary.conflict_share:.0%}",
            f"{summary.accepted}/{summary.tried}" if cost else "",
            f"{summary.seconds:.0f}",
            end_section=cost,
        )
    return table


def make_title(name: str, steps: int) -> str:
    """What a problem is, in one line.

    Args:
        name: Key of `PROBLEMS`.
        steps: Optimizer steps of each of its runs.
    """
    problem = PROBLEMS[name]
    weights = " : ".join(f"{problem.loss_weights.get(task, 1.0):g}" for task in problem.tasks)
    tasks = ", ".join(problem.tasks)
    return f"[bold]{problem.title}[/bold]: {tasks}; loss weights {weights}; width {problem.width}; {steps} steps"


def make_caption(seeds: Sequence[int], jobs: int) -> Table:
    """What the numbers mean and what they do not show.

    Args:
        seeds: Seeds of each row.
        jobs: Runs at a time.
    """
    count = len(seeds)
    spread = "One seed has no standard error and shows no difference between methods."
    if count > 1:
        spread = (
            f"One standard error over seeds {', '.join(map(str, seeds))}. A 95% interval of a mean of {count} is"
            f" {student_t.ppf(0.975, count - 1):.1f} times as wide (Student's t), so a smaller change may well be"
            " chance, and of six changes one can look large by chance. The error of the single-task means, which all"
            " rows share, is left out; the seeds vary initial weights and the order of batches, but not the images."
        )
    caption = Table.grid(padding=(0, 2, 0, 0))
    caption.add_column(style="bold", no_wrap=True)
    caption.add_column()
    for term, meaning in (
        ("Δm%", "Mean relative loss of the test metrics against single-task networks of the same width (Eq. 14)."),
        ("±", spread),
        (
            "change by COST",
            "Δm% with COST minus without; negative is better. Both runs of a seed share initial weights and batches.",
        ),
        ("mean rank", "Over the metrics, among the six rows of methods; 1 is the best."),
        (
            "conflict",
            "Share of the steps in which the task with the smallest gradient opposes the mean gradient (Eq. 3), before"
            " any teleport. Every 10th step is looked at; for LS that is extra work, and part of its time.",
        ),
        ("teleports", "Accepted, of those tried: at every step with such a conflict, from the second epoch on."),
        (
            "time",
            f"Wall-clock seconds of one training run, {jobs} at a time, without Lightning's training logs; for"
            " single-task of one of the tasks.",
        ),
        (
            "steps",
            "Equally many for all methods, which is not equal time. Few, so that this ends within minutes: the networks"
            " are far from converged, and with more steps the differences may grow, shrink or turn.",
        ),
        (
            "test metrics",
            "Of the network after the last step; there is no model selection. The test digits are not new to COST,"
            " though: the prototype that led to its defaults was judged on them.",
        ),
        (
            "problems",
            "Not drawn at random: the narrow, imbalanced one is here because that prototype saw a gain by COST on it,"
            " the balanced one because it saw none. Neither proves anything about other problems.",
        ),
    ):
        caption.add_row(term, meaning)
    return caption


def _add_column(table: Table, header: str) -> None:
    table.add_column(header, justify="right", no_wrap=True)


def _metric(name: str, value: float) -> str:
    return f"{100 * value:.1f}" if name.endswith("accuracy") else f"{value:.2f}"


def _estimate(estimate: Estimate, sign: str = "") -> str:
    error = "" if math.isnan(estimate.error) else f" ± {estimate.error:.1f}"
    return f"{estimate.mean:{sign}.1f}{error}"
