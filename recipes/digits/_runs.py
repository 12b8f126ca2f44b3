"""The runs of the demo: two problems, three methods without and with COST, and single-task baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torchjd.aggregation import Aggregator, FairGrad, UPGrad

from lightning_cost import PenaltySearch, SymmetryTeleportCallback
from recipes.common.compare import SINGLE_TASK, Run, Variant
from recipes.common.training import train_and_test
from recipes.digits.data import DigitsDataModule
from recipes.digits.model import METRICS, DigitsModel

__all__ = ["METHODS", "PROBLEMS", "TELEPORTS", "Problem", "RunSpec", "plan", "plan_traces", "train"]

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


@dataclass(frozen=True)
class Problem:
    """Tasks, and a network for them.

    Attributes:
        title: What the demo calls it.
        tasks: Tasks of `DigitsModel`.
        width: Features that the heads share.
        epochs: How long to train.
        loss_weights: Factors of the losses.
    """

    title: str
    tasks: tuple[str, ...]
    width: int
    epochs: int
    loss_weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> dict[str, bool]:
        """The metrics of the tasks."""
        return {f"{task}_{METRICS[task]}": METRICS[task] == "accuracy" for task in self.tasks}


PROBLEMS = {
    "narrow": Problem(
        "narrow, imbalanced", ("left", "right"), width=16, epochs=10, loss_weights={"left": 1.0, "right": 0.03}
    ),
    "balanced": Problem("balanced", ("left", "right", "ink"), width=64, epochs=4),
}


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
        rows += [(Variant(method, cost), None) for method in METHODS for cost in (False, True)]
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
        RunSpec("narrow", Variant("LS", cost=True), seed, epochs=2, num_train=num_train, teleport=teleport)
        for teleport in TELEPORTS
        if teleport != "default"
    ]


class _UnloggedModel(DigitsModel):
    """Logs no training losses: nobody reads them here, and they take a fifth of a step this small."""

    def log_dict(self, *args: object, **kwargs: object) -> None:
        pass


def train(spec: RunSpec) -> Run:
    """Do one run. Of the traces of its teleports it keeps the first alone, which are all that is drawn."""
    problem = PROBLEMS[spec.problem]
    tasks = problem.tasks if spec.task is None else (spec.task,)

    def make_model() -> DigitsModel:
        if spec.task is not None:
            return _UnloggedModel(tasks, problem.width)
        return _UnloggedModel(tasks, problem.width, problem.loss_weights, METHODS[spec.variant.method]())

    measured = train_and_test(
        make_model,
        DigitsDataModule(ink="ink" in tasks, shuffle_seed=spec.seed, num_train=spec.num_train),
        seed=spec.seed,
        epochs=spec.epochs,
        teleport=TELEPORTS[spec.teleport]() if spec.variant.cost else None,
        validate_every=2 if spec.epochs >= 8 else 1,
        look_every=10 if spec.task is None else None,
    )
    for report in measured.reports[1:]:
        report.trace.clear()
    return Run(spec.variant, spec.seed, measured)
