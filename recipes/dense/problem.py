"""Dense benchmarks as problems of studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lightning.pytorch.callbacks import Callback
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

from recipes.common.problem import Problem, checked_root
from recipes.dense.data import DenseDataModule
from recipes.dense.metrics import make_metrics
from recipes.dense.model import DenseModel, Network
from recipes.dense.pictures import ConfusionMatrixPlot, DensePictures
from recipes.dense.segnet import WIDTHS

__all__ = ["DenseProblem"]


@dataclass(frozen=True, kw_only=True)
class DenseProblem(Problem):
    """Segmentation and other targets of every pixel. The fields are arguments of `DenseModel` and `DenseDataModule`.

    Attributes:
        model: The model of the benchmark.
        data: Its data module.
    """

    model: ClassVar[type[DenseModel]]
    data: ClassVar[type[DenseDataModule]]

    root: str = ""
    network: Network = "mtan"
    widths: tuple[int, ...] = WIDTHS
    lr: float = 1e-4
    lr_milestones: tuple[int, ...] = (100,)
    lr_factor: float = 0.5
    batch_size: int = 8
    num_workers: int = 4
    augment: bool = True

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """The metrics of the tasks."""
        channels = {name: target.channels for name, target in self.data.layout.chosen_tasks(self.tasks).items()}
        metrics = {k: v for name, number in channels.items() for k, v in make_metrics(name, number, "batch").items()}
        return {name: bool(metric.higher_is_better) for name, metric in metrics.items()}

    def make_model(self, tasks: Sequence[str], method: Aggregator | Scalarizer | None) -> DenseModel:
        """A fresh model."""
        schedule = {"lr": self.lr, "lr_milestones": self.lr_milestones, "lr_factor": self.lr_factor}
        return self.model(tasks, self.network, self.widths, mtl_method=method, **schedule)

    def make_data(self, tasks: Sequence[str], seed: int) -> DenseDataModule:
        """The same examples for every seed, in another order and with other augmentations."""
        return self.data(
            checked_root(self.root),
            tasks=tasks,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            augment=self.augment,
            seed=seed,
        )

    def make_callbacks(self, folder: Path) -> list[Callback]:
        """What is predicted after the last epoch, and which classes are taken for which."""
        return [DensePictures(self.epochs, 4, folder), ConfusionMatrixPlot(self.epochs, folder)]
