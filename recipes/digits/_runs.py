"""The runs of the demo: two problems, three methods without and with COST, and single-task baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torchjd.aggregation import Aggregator, FairGrad, UPGrad

from lightning_cost import PenaltySearch, SymmetryTeleportCallback
from recipes.common.compare import SINGLE_TASK, Run, Variant
from recipes.common.training import train_and_test
from recipes.digits import problems

__all__ = ["METHODS", "PROBLEMS", "TELEPORTS", "RunSpec", "plan", "plan_traces", "train"]

METHODS: dict[str, Callable[[], Aggregator | None]] = {
    "LS": lambda: None,
    "FairGrad": lambda: FairGrad(alpha=2.0),
    "UPGrad": UPGrad,
}

TELEPORTS: dict[str, Callable[[], SymmetryTeleportCallback]] = {
    "default": SymmetryTeleportCallback,
    "paper": lambda: SymmetryTeleportCallback.paper(max_per_epoch=1),
    "penalty": lambda: SymmetryTeleportCallback(search=PenaltySearch(steps=50, lr=1e-3), max_per_epoch=1),
}
"""Settings of COST. The comparison uses the first; the others are there for one teleport each."""


PROBLEMS = {name: replace(problems.PROBLEMS[name], epochs=epochs) for name, epochs in (("narrow", 10), ("balanced", 4))}
"""For so few epochs that the demo ends within minutes."""


@dataclass(frozen=True)
class RunSpec:
    """Which run to do.

    Attributes:
        problem: Key of `PROBLEMS`.
        variant: The method, or the single-task baseline, without or with COST.
        seed: Seed of the initial weights and of the order of the batches; the data are the same for all seeds.
        epochs: How long to train.
        task: The one task of a single-task run.
        num_train: Number of training pairs.
        teleport: Key of `TELEPORTS`, for a variant with COST.
    """

    problem: str
    variant: Variant
    seed: int
    epochs: int
    task: str | None = None
    num_train: int = 4000
    teleport: str = "default"

    @property
    def name(self) -> str:
        """Unique among the runs."""
        detail = self.task or (f"({self.teleport})" if self.teleport != "default" else "")
        return f"{self.problem}: {self.variant} {detail}".rstrip() + f", seed {self.seed}"


def plan(seeds: Sequence[int], epochs: int | None = None, num_train: int = 4000) -> list[RunSpec]:
    """All runs of the comparison.

    Args:
        seeds: Seeds of each variant.
        epochs: How long to train; None: as the problem says.
        num_train: Number of training pairs.
    """
    specs = []
    for name, problem in PROBLEMS.items():
        rows: list[tuple[Variant, str | None]] = [(Variant(SINGLE_TASK), task) for task in problem.tasks]
        rows += [(Variant(method, callback), None) for method in METHODS for callback in ("", "COST")]
        specs += [
            RunSpec(name, variant, seed, epochs or problem.epochs, task, num_train)
            for variant, task in rows
            for seed in seeds
        ]
    return specs


def plan_traces(seed: int, num_train: int = 4000) -> list[RunSpec]:
    """Short runs that set out like LS with COST on the narrow problem, but teleport by another search.

    Their first teleport starts from the same weights on the same batch as that of the run in the comparison: with two
    tasks, the triggers of the paper and of the defaults agree.
    """
    return [
        RunSpec("narrow", Variant("LS", "COST"), seed, epochs=2, num_train=num_train, teleport=teleport)
        for teleport in TELEPORTS
        if teleport != "default"
    ]


def train(spec: RunSpec) -> Run:
    """Do one run. Of the traces of its teleports it keeps the first alone, which are all that is drawn."""
    problem = replace(PROBLEMS[spec.problem], num_train=spec.num_train)
    tasks = problem.tasks if spec.task is None else (spec.task,)

    method = METHODS[spec.variant.method]() if spec.task is None else None
    measured = train_and_test(
        lambda: problem.make_model(tasks, method),
        problem.make_data(tasks, spec.seed),
        seed=spec.seed,
        epochs=spec.epochs,
        teleport=TELEPORTS[spec.teleport]() if spec.variant.callback else None,
        validate_every=2 if spec.epochs >= 8 else 1,
        look_every=10 if spec.task is None else None,
    )
    for report in measured.reports[1:]:
        report.trace.clear()
    return Run(spec.variant, spec.seed, measured)
