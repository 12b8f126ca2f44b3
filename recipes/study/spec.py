"""One run of a study, and the name under which it is stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from recipes.common.compare import SINGLE_TASK, Variant
from recipes.study.problem import baseline_problem, find_problem

__all__ = ["Row", "RunSpec", "plan"]


@dataclass(frozen=True)
class Row:
    """One row of a table: what is run with every seed.

    Attributes:
        problem: See `find_problem`.
        variant: The method, without a callback or with one.
    """

    problem: str
    variant: Variant


@dataclass(frozen=True)
class RunSpec:
    """One run.

    Attributes:
        problem: See `find_problem`.
        variant: The method, or the single-task baseline, without a callback or with one.
        seed: Seed of the initial weights and of the order of the batches.
        epochs: How long to train.
        task: The one task of a single-task run.
    """

    problem: str
    variant: Variant
    seed: int
    epochs: int
    task: str | None = None

    @property
    def name(self) -> str:
        """Unique among the runs, and the stem of a file."""
        parts = [
            self.problem,
            self.variant.method,
            self.variant.callback or "plain",
            self.task or "",
            f"e{self.epochs}",
        ]
        words = (re.sub(r"[^A-Za-z0-9.=+-]+", "_", part).strip("_") for part in parts if part)
        return "__".join([*words, f"s{self.seed}"])


def plan(rows: Sequence[Row], seeds: Sequence[int], epochs: int | None = None) -> list[RunSpec]:
    """All runs of a study: the rows, and for each problem its single-task baselines.

    Args:
        rows: The rows.
        seeds: Seeds of each row.
        epochs: How long to train everything; None: as the problems say.

    Raises:
        ValueError: If a seed is given twice or none at all, or two runs have names that cannot be told apart in a file.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"`seeds` must hold at least one seed, each once; got {list(seeds)}.")
    specs: dict[RunSpec, None] = {}
    for row in rows:
        problem, baseline = find_problem(row.problem), baseline_problem(row.problem)
        length = epochs or problem.epochs
        for seed in seeds:
            for task in problem.tasks:
                specs[RunSpec(baseline, Variant(SINGLE_TASK), seed, length, task)] = None
            specs[RunSpec(row.problem, row.variant, seed, length)] = None
    names: dict[str, RunSpec] = {}
    for spec in specs:
        if names.setdefault(spec.name, spec) != spec:
            raise ValueError(f"Two runs have the same name {spec.name!r}: {spec} and {names[spec.name]}. Rename one.")
    return list(specs)
