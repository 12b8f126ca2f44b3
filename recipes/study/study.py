"""A study: a grid of methods, callbacks and seeds, from the runs to the tables."""

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
"""What to tell a user who ends a study."""


@dataclass(frozen=True)
class Study:
    """A grid of methods, callbacks and seeds.

    It can be interrupted at any time and run again: what is finished is on disk.

    Args:
        rows: What to run; see `Row`. Each with a callback is compared with that of the same problem and method without.
        output: Folder of the runs. Studies may share it: a run that two of them need is done once.
        seeds: Seeds of each row.
        epochs: How long to train everything; None: as the problems say.
        title: What the tables say above.

    Example:
        ```python
        from recipes.study import Row, Study, Variant

        rows = [Row("digits:narrow", Variant("LS")), Row("digits:narrow", Variant("LS", "COST"))]
        study = Study(rows, output=Path("study_output"), seeds=range(5))
        if __name__ == "__main__":  # the runs are in processes of their own, which import this file
            study.run(jobs=2)
            print(study.results().markdown())
        ```
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

    def folder(self, spec: RunSpec) -> Path:
        """Where the callbacks of a run's problem write, see `Problem.make_callbacks`."""
        return self.output / "runs" / spec.name

    def run(self, jobs: int = 1, console: Console | None = None) -> int:
        """Do the runs that are missing; returns how many. See `run_missing`."""
        return run_missing(self.specs, self.output / "runs", jobs, console or Console())

    def results(self, split: Split = "validation") -> Results:
        """What the finished runs say.

        Args:
            split: Which metrics. Choose settings on `validation`, and look at `test` once, when you have chosen.

        Raises:
            StoredRunError: If a run is missing.
        """
        store = Store(self.output / "runs")
        loaded = {spec: store.load(spec) for spec in self.specs}
        records = {}
        for name in dict.fromkeys(row.problem for row in self.rows):
            baseline = baseline_problem(name)
            records[name] = [
                record for spec, record in loaded.items() if spec.problem == (name if spec.task is None else baseline)
            ]
        return Results(self.title, list(self.seeds), split, records)
