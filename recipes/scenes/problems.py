"""What studies and the demo train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

from recipes.common.problem import Problem
from recipes.dense.metrics import make_metrics
from recipes.dense.pictures import ConfusionMatrixPlot, DensePictures
from recipes.nyuv2 import NYUv2Model
from recipes.scenes.data import ROOMS, RoomsDataModule

__all__ = ["PROBLEMS", "RoomsProblem"]

_LR_FACTOR = 0.3


class _RoomsModel(NYUv2Model):
    layout = ROOMS


@dataclass(frozen=True, kw_only=True)
class RoomsProblem(Problem):
    """Segmentation, depth and surface normals of rooms, by a SegNet.

    Attributes:
        widths: Features of its five stages.
        lr: Learning rate of Adam.
        lr_milestones: Epochs before which it is multiplied by 0.3.
        batch_size: Rooms a batch.
        num_train: Number of rooms to train on.
        num_val: Number of rooms to validate on, and to test on: the layout has two splits.
        height: Rows of the images, a multiple of 32.
        width: Columns of the images, a multiple of 32.
    """

    widths: tuple[int, ...]
    lr: float
    lr_milestones: tuple[int, ...]
    batch_size: int
    num_train: int
    num_val: int
    height: int
    width: int

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """The metrics of the tasks."""
        channels = {name: target.channels for name, target in ROOMS.chosen_tasks(self.tasks).items()}
        metrics = {k: v for name, number in channels.items() for k, v in make_metrics(name, number, "batch").items()}
        return {name: bool(metric.higher_is_better) for name, metric in metrics.items()}

    def make_model(self, tasks: Sequence[str], method: Aggregator | Scalarizer | None) -> NYUv2Model:
        """A fresh model."""
        return _RoomsModel(
            tasks,
            "segnet",
            self.widths,
            mtl_method=method,
            lr=self.lr,
            lr_milestones=self.lr_milestones,
            lr_factor=_LR_FACTOR,
        )

    def make_data(self, tasks: Sequence[str], seed: int) -> RoomsDataModule:
        """The same rooms for every seed, in another order. Augmentation costs more epochs than there are here."""
        size = (self.num_train, self.num_val, self.height, self.width)
        return RoomsDataModule(tasks, *size, batch_size=self.batch_size, augment=False, seed=seed)

    def make_callbacks(self, folder: Path) -> list[Callback]:
        """What is predicted after the last epoch, and which classes are taken for which."""
        return [DensePictures(self.epochs, 4, folder), ConfusionMatrixPlot(self.epochs, folder)]


PROBLEMS = {
    "rooms": RoomsProblem(
        title="rooms, drawn",
        tasks=tuple(ROOMS.tasks),
        epochs=5,
        evaluations=5,
        # Ten looks an epoch.
        look_every=10,
        widths=(16, 32, 32, 64, 64),
        lr=2e-3,
        lr_milestones=(4,),
        batch_size=8,
        num_train=800,
        num_val=200,
        height=64,
        width=96,
    )
}
