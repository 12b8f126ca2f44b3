"""What studies train on."""

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
    """Properties of molecules.

    Attributes:
        width: Features of an atom.
        edge_hidden: Hidden features of the edge network.
        lr: Learning rate of Adam.
        schedule: See `QM9Model`.
        num_molecules: Number of molecules; None: all.
        num_val: Those of them to validate on.
        num_test: Those of them to test on.
        batch_size: Molecules a batch.
    """

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
        """The mean absolute errors."""
        return {f"{name}_mae": False for name in self.tasks}

    def make_model(self, tasks: Sequence[str], method: Aggregator | Scalarizer | None) -> QM9Model:
        """A fresh model."""
        return QM9Model(tasks, self.width, self.edge_hidden, method, self.lr, self.schedule)

    def make_data(self, tasks: Sequence[str], seed: int) -> QM9DataModule:
        """The same molecules and the same split for every seed, in another order."""
        return QM9DataModule(
            targets=tasks,
            batch_size=self.batch_size,
            num_molecules=self.num_molecules,
            num_val=self.num_val,
            num_test=self.num_test,
            shuffle_seed=seed,
        )

    def make_callbacks(self, folder: Path) -> list[Callback]:
        """What draws the predictions for the test molecules."""
        return [ParityPlot(folder)]


PROBLEMS = {
    "small": QM9Problem(
        title="QM9, 10,000 molecules",
        tasks=BENCHMARK,
        epochs=4,
        evaluations=4,
        # Five looks an epoch.
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
