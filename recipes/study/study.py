"""A study: a grid of methods, callbacks and seeds, from the runs to the tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from recipes.common.compare import SINGLE_TASK
from recipes.study.figures import draw
from recipes.study.problem import baseline_problem, find_problem
from recipes.study.report import CAPTION, markdown_table, summary_row, write_csv
from recipes.study.runner import run_missing
from recipes.study.spec import Row, RunSpec, plan
from recipes.study.statistics import RowSummary, Split, delta_m_curves, group, summarize
from recipes.study.store import Record, Store

__all__ = ["Study"]


@dataclass(frozen=True)
class Study:
    """A grid of methods, callbacks and seeds.

    It can be interrupted at any time and run again: what is finished is on disk.

    Args:
        rows: What to run; see `Row`. Each with a callback is compared with that of the same problem and method without.
        output: Folder of the runs, tables and figures. Studies may share it: a run that two of them need is done once.
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
            print(study.markdown())
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

    def run(self, jobs: int = 1, console: Console | None = None) -> int:
        """Do the runs that are missing; returns how many. See `run_missing`."""
        return run_missing(self.specs, self.output / "runs", jobs, console or Console())

    def records(self, reports: bool = False) -> dict[str, list[Record]]:
        """Problem to its finished runs, single-task baselines first.

        Args:
            reports: Whether to read the teleports too.

        Raises:
            StoredRunError: If a run is missing.
        """
        store = Store(self.output / "runs")
        loaded = {spec: store.load(spec, reports) for spec in self.specs}
        return {
            name: [
                record
                for spec, record in loaded.items()
                if (spec.task is not None and spec.problem == baseline_problem(name))
                or (spec.task is None and spec.problem == name)
            ]
            for name in dict.fromkeys(row.problem for row in self.rows)
        }

    def summaries(self, split: Split = "validation") -> dict[str, list[RowSummary]]:
        """Problem to its rows, summarized over the seeds.

        Args:
            split: Which metrics. Choose settings on `validation`, and look at `test` once, when you have chosen.
        """
        return {
            name: summarize(name, find_problem(name), records, split) for name, records in self.records(True).items()
        }

    def markdown(self, split: Split = "validation") -> str:
        """The tables of all problems, and what their columns mean."""
        seeds = list(self.seeds)
        parts = [f"## {self.title}", f"{split.capitalize()} metrics; seeds {', '.join(map(str, seeds))}."]
        records = self.records(reports=True)
        mixed = {tuple(record.versions.items()) for of_problem in records.values() for record in of_problem}
        if len(mixed) > 1:
            parts.append(f"**These runs are not all of the same versions**: {[dict(versions) for versions in mixed]}.")
        for name, of_problem in records.items():
            problem = find_problem(name)
            steps = {record.measured.steps for record in of_problem if record.spec.variant.method != SINGLE_TASK}
            parts.append(f"### {problem.title} (`{name}`), {' and '.join(map(str, sorted(steps)))} steps")
            parts.append(markdown_table(problem, summarize(name, problem, of_problem, split)))
        return "\n\n".join([*parts, CAPTION]) + "\n"

    def write(self, split: Split = "validation", stem: str = "study") -> Iterator[tuple[str, Path]]:
        """Write tables and figures.

        Args:
            split: See `summaries`.
            stem: Of the files' names.

        Yields:
            What a file holds, and the file.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"{stem}_{split}.md"
        path.write_text(self.markdown(split), encoding="utf-8")
        yield "the tables", path
        records = self.records(reports=True)
        summaries = {n: summarize(n, find_problem(n), of_problem, split) for n, of_problem in records.items()}
        path = self.output / f"{stem}_{split}_summary.csv"
        write_csv(path, [summary_row(summary) for rows in summaries.values() for summary in rows])
        yield "one row a method and callback", path
        path = self.output / f"{stem}_{split}_curves.csv"
        grouped = {name: group(of_problem) for name, of_problem in records.items()}
        curves = {name: delta_m_curves(find_problem(name), runs, split) for name, runs in grouped.items()}
        write_csv(
            path,
            [
                {"problem": name, **asdict(variant), "seed": seed, "step": step, "seconds": second, "delta_m": value}
                for name, of_problem in curves.items()
                for variant, of_seeds in of_problem.items()
                for seed, curve in of_seeds.items()
                for step, second, value in zip(curve.steps, curve.seconds, curve.values, strict=True)
            ],
        )
        yield "Δm% along training, one row an evaluation", path
        for name, runs in grouped.items():
            # One problem needs no name beside that of the study.
            which = re.sub(r"[^A-Za-z0-9.=+-]+", "_", name) if len(grouped) > 1 else "figure"
            problem_stem = f"{stem}_{split}_{which}"
            yield from draw(problem_stem, runs, curves[name], summaries[name], self.output, split)
