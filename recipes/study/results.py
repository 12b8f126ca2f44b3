"""Results of a study: tables and figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from recipes.common.compare import SINGLE_TASK, Variant
from recipes.study.figures import draw
from recipes.study.problem import find_problem
from recipes.study.report import CAPTION, markdown_table, run_row, summary_row, write_csv
from recipes.study.spec import file_stem
from recipes.study.statistics import RowSummary, Split, delta_m_curves, final_metrics, group, summarize
from recipes.study.store import Record

__all__ = ["Results"]


@dataclass(frozen=True)
class Results:
    """The finished runs of a study.

    Attributes:
        title: Title of the tables.
        seeds: Seeds of each row.
        split: Which metrics to compare.
        records: Name of a problem to its runs, single-task baselines included.
    """

    title: str
    seeds: Sequence[int]
    split: Split
    records: Mapping[str, Sequence[Record]]

    @cached_property
    def summaries(self) -> dict[str, list[RowSummary]]:
        """Name of a problem to its rows, summarized over the seeds."""
        return {name: summarize(find_problem(name), records, self.split) for name, records in self.records.items()}

    def markdown(self) -> str:
        """The tables of all problems, and what their columns mean."""
        seeds = ", ".join(map(str, self.seeds))
        parts = [f"## {self.title}", f"{self.split.capitalize()} metrics; seeds {seeds}."]
        versions = {tuple(record.versions.items()) for records in self.records.values() for record in records}
        if len(versions) > 1:
            parts.append(f"**These runs have different versions**: {[dict(pairs) for pairs in versions]}.")
        for name, records in self.records.items():
            problem = find_problem(name)
            steps = {record.measured.steps for record in records if record.spec.task is None}
            parts.append(f"### {problem.title} (`{name}`), {' and '.join(map(str, sorted(steps)))} steps")
            singles = final_metrics(problem, group(records)[Variant(SINGLE_TASK)].values(), self.split)
            parts.append(markdown_table(problem, singles, self.summaries[name]))
        return "\n\n".join([*parts, CAPTION]) + "\n"

    def write(self, folder: Path, stem: str = "study") -> Iterator[tuple[str, Path]]:
        """Write tables and figures to files whose names begin with `stem`. Yields what a file holds, and the file."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{stem}_{self.split}"
        path = folder / f"{stem}.md"
        path.write_text(self.markdown(), encoding="utf-8")
        yield "the tables", path

        path = folder / f"{stem}_summary.csv"
        write_csv(path, [summary_row(name, row) for name, rows in self.summaries.items() for row in rows])
        yield "one row per method and callback", path

        path = folder / f"{stem}_runs.csv"
        records = {record.spec: record for of_problem in self.records.values() for record in of_problem}
        write_csv(path, [run_row(record, self.split) for record in records.values()])
        yield "one row per run", path

        grouped = {name: group(records) for name, records in self.records.items()}
        curves = {name: delta_m_curves(find_problem(name), runs, self.split) for name, runs in grouped.items()}
        path = folder / f"{stem}_curves.csv"
        rows = [
            {"problem": name, **asdict(variant), "seed": seed, "step": step, "seconds": second, "delta_m": value}
            for name, of_problem in curves.items()
            for variant, of_seeds in of_problem.items()
            for seed, curve in of_seeds.items()
            for step, second, value in zip(curve.steps, curve.seconds, curve.values, strict=True)
        ]
        write_csv(path, rows)
        yield "Δm% along training, one row per evaluation", path

        for name, runs in grouped.items():
            # A single problem needs no name in the file names.
            which = file_stem(name) if len(grouped) > 1 else "figure"
            label = f"{self.split} Δm%"
            yield from draw(f"{stem}_{which}", runs, curves[name], self.summaries[name], folder, label)
