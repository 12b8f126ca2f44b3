"""The problems of QM9 for studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

from recipes.common.problem import Problem
from recipes.qm9.data import QM9DataModule
from recipes.qm9.model import QM9Model, Schedule
from recipes.qm9.parity import ParityPlot
from recipes.qm9.targets import BENCHMARK

__all__ = ["PROBLEMS", "QM9Problem"]


@dataclass(frozen=True, kw_only=True)
class QM9Problem(Problem):
    """Properties of molecules. The fields are arguments of `QM9Model` and `QM9DataModule`."""

    width: int
    edge_hidden: int
    lr: float
    schedule: Schedule
    num_molecules: int | None
    num_val: int
    num_test: int
    batch_size: int = 120

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """Mean absolute errors, for which lower is better."""
        return {f"{name}_mae": False for name in self.tasks}

    def make_model(self, tasks: Sequence[str], method: Aggregator | Scalarizer | None) -> QM9Model:
        """Make a new model."""
        return QM9Model(tasks, self.width, self.edge_hidden, method, self.lr, self.schedule)

    def make_data(self, tasks: Sequence[str], seed: int) -> QM9DataModule:
        """Make the data: the same molecules and split for every seed, in another order."""
        return QM9DataModule(
            targets=tasks,
            batch_size=self.batch_size,
            num_molecules=self.num_molecules,
            num_val=self.num_val,
            num_test=self.num_test,
            shuffle_seed=seed,
        )

    def make_callbacks(self, folder: Path) -> list[Callback]:
        """Draw the predictions for the test molecules."""
        return [ParityPlot(folder)]


PROBLEMS = {
    "small": QM9Problem(
        title="QM9, 10,000 molecules",
        tasks=BENCHMARK,
        epochs=4,
        evaluations=4,
        # Five times per epoch.
        look_every=26,
        width=32,
        edge_hidden=16,
        lr=2e-3,
        schedule="plateau",
        num_molecules=10_000,
        num_val=1_000,
        num_test=1_000,
        batch_size=60,
    )
}
