"""The runs of a study, and the names under which they are stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from recipes.common.compare import SINGLE_TASK, Variant
from recipes.study.problem import baseline_problem, find_problem

__all__ = ["Row", "RunSpec", "file_stem", "plan"]


@dataclass(frozen=True)
class Row:
    """One row of a table, which is run with every seed. `problem` is a name as in `find_problem`."""

    problem: str
    variant: Variant


@dataclass(frozen=True)
class RunSpec:
    """One run.

    Attributes:
        problem: Name of the problem, see `find_problem`.
        variant: The method or the single-task baseline, without a callback or with one.
        seed: Seed of the initial weights and of the order of the batches.
        epochs: Number of epochs.
        task: The task of a single-task run.
    """

    problem: str
    variant: Variant
    seed: int
    epochs: int
    task: str | None = None

    @property
    def name(self) -> str:
        """A unique name that can be a file name."""
        parts = (self.problem, self.variant.method, self.variant.callback or "plain", self.task or "")
        return "__".join([*(file_stem(part).strip("_") for part in parts if part), f"e{self.epochs}", f"s{self.seed}"])


def file_stem(text: str) -> str:
    """The text with an underscore for all that does not belong in a file name."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", text)


def plan(rows: Sequence[Row], seeds: Sequence[int], epochs: int | None = None) -> list[RunSpec]:
    """List all runs of a study: the rows, and the single-task baselines of each problem. See `Study`.

    Raises:
        ValueError: If there is no seed, if a seed is given twice, or if two runs would have the same file name.
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
