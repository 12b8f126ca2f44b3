"""What the runs of a study say: tables and figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from recipes.common.compare import SINGLE_TASK
from recipes.study.figures import draw
from recipes.study.problem import find_problem
from recipes.study.report import CAPTION, markdown_table, summary_row, write_csv
from recipes.study.statistics import RowSummary, Split, delta_m_curves, group, summarize
from recipes.study.store import Record

__all__ = ["Results"]


@dataclass(frozen=True)
class Results:
    """The finished runs of a study.

    Attributes:
        title: What the tables say above.
        seeds: Seeds of each row.
        split: Which metrics to compare.
        records: Problem to its runs, those of its single-task baselines among them.
    """

    title: str
    seeds: Sequence[int]
    split: Split
    records: Mapping[str, Sequence[Record]]

    @cached_property
    def summaries(self) -> dict[str, list[RowSummary]]:
        """Problem to its rows, summarized over the seeds."""
        return {
            name: summarize(name, find_problem(name), records, self.split) for name, records in self.records.items()
        }

    def markdown(self) -> str:
        """The tables of all problems, and what their columns mean."""
        seeds = ", ".join(map(str, self.seeds))
        parts = [f"## {self.title}", f"{self.split.capitalize()} metrics; seeds {seeds}."]
        versions = {tuple(record.versions.items()) for records in self.records.values() for record in records}
        if len(versions) > 1:
            parts.append(f"**These runs are not all of the same versions**: {[dict(pairs) for pairs in versions]}.")
        for name, records in self.records.items():
            problem = find_problem(name)
            steps = {record.measured.steps for record in records if record.spec.variant.method != SINGLE_TASK}
            parts.append(f"### {problem.title} (`{name}`), {' and '.join(map(str, sorted(steps)))} steps")
            parts.append(markdown_table(problem, self.summaries[name]))
        return "\n\n".join([*parts, CAPTION]) + "\n"

    def write(self, folder: Path, stem: str = "study") -> Iterator[tuple[str, Path]]:
        """Write tables and figures.

        Args:
            folder: Where to write.
            stem: Of the files' names.

        Yields:
            What a file holds, and the file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{stem}_{self.split}"
        path = folder / f"{stem}.md"
        path.write_text(self.markdown(), encoding="utf-8")
        yield "the tables", path
        path = folder / f"{stem}_summary.csv"
        write_csv(path, [summary_row(summary) for rows in self.summaries.values() for summary in rows])
        yield "one row a method and callback", path
        grouped = {name: group(records) for name, records in self.records.items()}
        curves = {name: delta_m_curves(find_problem(name), runs, self.split) for name, runs in grouped.items()}
        path = folder / f"{stem}_curves.csv"
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
            yield from draw(f"{stem}_{which}", runs, curves[name], self.summaries[name], folder, self.split)
