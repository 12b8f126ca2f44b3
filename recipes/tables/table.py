"""Rows from the results of runs, as a table for the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from lightning_cost.metrics import mean_rank
from recipes.tables.benchmarks import Benchmark

__all__ = ["Row", "headings", "rows_of", "to_markdown", "to_table", "write_runs"]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        label: The method.
        source: Whose numbers these are: `ours` or `paper`.
        seeds: Number of seeds; None: unknown.
        values: The shown columns; NaN where there is no number.
        mean_rank: Mean rank among the rows of the same source.
        delta_m: Mean Δm%.
        deviation: Its standard deviation over seeds.
    """

    label: str
    source: str
    seeds: int | None
    values: tuple[float, ...]
    mean_rank: float
    delta_m: float
    deviation: float

    def cells(self, benchmark: Benchmark) -> list[str]:
        """The line as text."""
        shown = benchmark.columns[: benchmark.shown]
        values = [_text(value, column.digits) for value, column in zip(self.values, shown, strict=True)]
        delta = _text(self.delta_m, 2) + (f" ± {self.deviation:.2f}" if math.isfinite(self.deviation) else "")
        seeds = "" if self.seeds is None else str(self.seeds)
        return [self.label, self.source, seeds, *values, _text(self.mean_rank, 2), delta]


def rows_of(benchmark: Benchmark, results: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Row]:
    """A row a method, and below it what the paper published for it.

    Args:
        benchmark: The benchmark.
        results: Row to the results of its seeds.
    """
    means = {
        label: [statistics.mean(seed[column.metric] for seed in seeds) for column in benchmark.columns]
        for label, seeds in results.items()
    }
    directions = [column.higher_is_better for column in benchmark.columns]
    ranks = mean_rank(torch.tensor(list(means.values()), dtype=torch.double), directions).tolist()
    rows = [_published(benchmark, "Independent")]
    for (label, seeds), rank in zip(results.items(), ranks, strict=True):
        deltas = [seed["delta_m"] for seed in seeds]
        shown = zip(means[label], benchmark.columns[: benchmark.shown], strict=False)
        values = tuple(value * column.factor for value, column in shown)
        deviation = statistics.stdev(deltas) if len(deltas) > 1 else math.nan
        rows += [Row(label, "ours", len(seeds), values, rank, statistics.mean(deltas), deviation)]
        rows += [_published(benchmark, label)]
    return [row for row in rows if row is not None]  # type: ignore[misc]


def headings(benchmark: Benchmark) -> list[str]:
    """The titles of the columns, with arrows in the better direction."""
    arrows = {True: "↑", False: "↓"}
    shown = [f"{column.title} {arrows[column.higher_is_better]}" for column in benchmark.columns[: benchmark.shown]]
    return ["method", "numbers", "seeds", *shown, "MR ↓", "Δm% ↓"]


def to_table(benchmark: Benchmark, rows: Sequence[Row], caption: str) -> Table:
    """The rows for the terminal; those of the paper are dim."""
    table = Table(title=benchmark.title, caption=caption, caption_justify="left")
    for index, heading in enumerate(headings(benchmark)):
        table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells(benchmark), style="dim" if row.source == "paper" else None)
    return table


def to_markdown(benchmark: Benchmark, rows: Sequence[Row], caption: str) -> str:
    """The rows as Markdown."""
    titles = headings(benchmark)
    lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)], *(row.cells(benchmark) for row in rows)]
    return f"## {benchmark.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{caption}\n"


def write_runs(path: Path, runs: Sequence[tuple[str, int, Mapping[str, float]]]) -> None:
    """One line a run: row, seed and all metrics, in the units of the logs."""
    names = list(dict.fromkeys(name for _, _, result in runs for name in result))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *names])
        writer.writerows([label, seed, *(result.get(name, "") for name in names)] for label, seed, result in runs)


def _published(benchmark: Benchmark, label: str) -> Row | None:
    figures = benchmark.published.get(label)
    if figures is None:
        return None
    *values, rank, delta = (math.nan if figure is None else figure for figure in figures)
    return Row(label, "paper", None, tuple(values), rank, delta, math.nan)


def _text(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else ""
