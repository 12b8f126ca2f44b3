"""Fig. 5(a): the share of conflicting steps along training, by each definition of conflict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from recipes.common.compare import Estimate
from recipes.common.training import Look
from recipes.figures.request import Request, markdown, measure
from recipes.study.figures import share_of_looks
from recipes.study.plots import Curves, learning_curves
from recipes.study.problem import find_problem
from recipes.study.report import write_csv

__all__ = ["DEFINITIONS", "draw_conflict_ratio"]

DEFINITIONS: dict[str, Callable[[Look], bool]] = {
    "smallest gradient (Eq. 3)": lambda look: look.conflict,
    "half of the tasks (Eq. 4)": lambda look: look.majority,
    "any task with the mean": lambda look: look.cosine < 0,
    "any two tasks (weak)": lambda look: look.weak,
}
"""What counts as a conflict, by the label in figures and tables."""
_MOST_SPANS = 10


def draw_conflict_ratio(request: Request, console: Console) -> Iterator[tuple[str, Path]]:
    """Train every problem with every method, and yield what each written file shows, and the file."""
    panels: dict[str, dict[str, Curves]] = {}
    table, spans = [], []
    for row, runs in measure(request, [""], console).items():
        problem = find_problem(row.problem)
        tasks = len(problem.tasks)
        title = f"{problem.title}: {tasks} tasks"
        if len(request.methods) > 1:
            title += f", {row.variant}"
        cells = []
        for label, flag in DEFINITIONS.items():
            shares = [sum(map(flag, run.looks)) / len(run.looks) for run in runs]
            estimate = Estimate.of(shares)
            cells.append(f"{estimate.mean:.0%} ({min(shares):.0%} to {max(shares):.0%})")
            curves = share_of_looks(runs, flag, _MOST_SPANS)
            values = np.asarray(curves.values, dtype=float)
            last = min(run.steps for run in runs)
            panels.setdefault(title, {})[label] = Curves([100 * step / last for step in curves.steps], curves.values)
            spans += [
                {"problem": row.problem, "method": row.variant.method, "tasks": tasks, "definition": label}
                | {"seed": seed, "step": float(step), "share": float(share)}
                for seed, of_seed in zip(request.seeds, values, strict=True)
                for step, share in zip(curves.steps, of_seed, strict=True)
            ]
        looks = sum(len(run.looks) for run in runs)
        table.append([problem.title, row.variant.method, str(tasks), str(looks), *cells])

    text = markdown(["problem", "method", "tasks", "steps", *DEFINITIONS], table)
    console.print(Markdown(text))
    path = request.output / "conflict_ratio.md"
    path.write_text(text, encoding="utf-8")
    yield "share of conflicting steps: mean and range over the seeds", path
    path = request.output / "conflict_ratio.csv"
    write_csv(path, spans)
    yield "the same along training, one row per seed and span", path
    path = request.output / "conflict_ratio.png"
    figure = learning_curves(panels, "share of conflicting steps", xlabel="steps of the training, %")
    # One legend for all panels, where it covers no curve.
    for ax in figure.axes:
        ax.legend().remove()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(DEFINITIONS))
    figure.savefig(path)
    yield "the same along training, mean and range over the seeds (Fig. 5a)", path
