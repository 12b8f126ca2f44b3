"""What a figure of the paper is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from recipes.common.compare import Variant
from recipes.common.training import Measured
from recipes.study import Row
from recipes.study.problem import find_problem
from recipes.study.runner import run_missing
from recipes.study.spec import RunSpec
from recipes.study.store import Store

__all__ = ["Request", "markdown", "measure"]


@dataclass(frozen=True)
class Request:
    """What to draw, and from which runs.

    Attributes:
        problems: Names of problems, see `find_problem`.
        methods: Names of methods.
        seeds: Seeds of each row.
        output: Folder of the runs and of the files. Figures and studies that share it also share their runs.
        epochs: Number of epochs of all runs; None: as the problems say.
        jobs: Runs at a time.
    """

    problems: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    output: Path
    epochs: int | None = None
    jobs: int = 1


def measure(request: Request, callbacks: Sequence[str], console: Console) -> dict[Row, list[Measured]]:
    """Run what is missing: every problem with every method and callback, without single-task baselines.

    Args:
        request: Problems, methods and seeds.
        callbacks: Names of callbacks; an empty one stands for none.
        console: Where to show progress.

    Returns:
        The runs of each row, in the order of the seeds.
    """
    specs = {
        Row(problem, Variant(method, callback)): [
            RunSpec(problem, Variant(method, callback), seed, request.epochs or find_problem(problem).epochs)
            for seed in request.seeds
        ]
        for problem in request.problems
        for method in request.methods
        for callback in callbacks
    }
    store = Store(request.output / "runs")
    run_missing([spec for of_row in specs.values() for spec in of_row], store, request.jobs, console)
    return {row: [store.load(spec).measured for spec in of_row] for row, of_row in specs.items()}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. The first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
