"""A study: a grid of methods, callbacks and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from recipes.study.problem import baseline_problem
from recipes.study.results import Results
from recipes.study.runner import run_missing
from recipes.study.spec import Row, RunSpec, plan
from recipes.study.statistics import Split
from recipes.study.store import Store

__all__ = ["INTERRUPTED", "Study"]

INTERRUPTED = "Interrupted. Finished runs are kept: the same command goes on with the others."
"""Message after Ctrl-C."""


@dataclass(frozen=True)
class Study:
    """A grid of methods, callbacks and seeds. You can interrupt it at any time and run it again.

    Args:
        rows: What to run. A row with a callback is compared with the row of the same problem and method without one.
        output: Folder of the runs. Studies that share it also share their runs.
        seeds: Seeds of each row.
        epochs: Number of epochs of all runs; None: as the problems say.
        title: Title of the tables.
    """

    rows: Sequence[Row]
    output: Path
    seeds: Sequence[int] = field(default_factory=lambda: range(5))
    epochs: int | None = None
    title: str = "Study"

    @property
    def specs(self) -> list[RunSpec]:
        """All runs."""
        return plan(self.rows, self.seeds, self.epochs)

    @property
    def store(self) -> Store:
        """Where finished runs are stored."""
        return Store(self.output / "runs")

    def folder(self, spec: RunSpec) -> Path:
        """Folder of the files that the callbacks of a run's problem write, see `Problem.make_callbacks`."""
        return self.store.folder / spec.name

    def run(self, jobs: int = 1, console: Console | None = None) -> int:
        """Run what is missing, and return the number of these runs. See `run_missing`."""
        return run_missing(self.specs, self.store, jobs, console or Console())

    def results(self, split: Split = "validation") -> Results:
        """Collect the finished runs.

        Args:
            split: Which metrics. Choose settings on `validation`, and look at `test` once, after the choice.

        Raises:
            StoredRunError: If a run is missing.
        """
        loaded = [self.store.load(spec) for spec in self.specs]
        records = {}
        for name in dict.fromkeys(row.problem for row in self.rows):
            baseline = baseline_problem(name)
            records[name] = [
                record for record in loaded if record.spec.problem == (name if record.spec.task is None else baseline)
            ]
        return Results(self.title, list(self.seeds), split, records)
