"""What studies and the demo train on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

from recipes.common.files import user_cache
from recipes.common.problem import Problem
from recipes.dense.metrics import make_metrics
from recipes.dense.pictures import ConfusionMatrixPlot, DensePictures
from recipes.nyuv2 import NYUV2, NYUv2DataModule, NYUv2Model
from recipes.scenes.writers import write_nyuv2

__all__ = ["PROBLEMS", "ROOMS", "RoomsDataModule", "RoomsProblem"]

ROOMS = replace(NYUV2, name="Drawn rooms")
"""NYUv2's files, which must not be taken for NYUv2."""


class RoomsDataModule(NYUv2DataModule):
    """Rooms in NYUv2's layout, drawn into the user's cache when they are first needed.

    Other processes draw them, so that a script needs its `if __name__ == "__main__":`.

    Args:
        tasks: See `DenseDataModule`.
        size: Numbers of training and validation examples, rows and columns of the images.
        **kwargs: See `DenseDataModule`.
    """

    layout = ROOMS

    def __init__(self, tasks: Sequence[str] | None, size: tuple[int, int, int, int], **kwargs: Any) -> None:
        num_train, num_val, height, width = self._size = size
        root = user_cache("scenes") / f"rooms-{num_train}-{num_val}-{height}x{width}"
        super().__init__(root, tasks=tasks, **kwargs)

    def prepare_data(self) -> None:
        """Draw the rooms that are missing."""
        write_nyuv2(self.root, *self._size, jobs=os.cpu_count() or 1, console=Console(stderr=True))


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

    widths: tuple[int, ...] = (16, 32, 32, 64, 64)
    lr: float = 2e-3
    lr_milestones: tuple[int, ...] = (4,)
    batch_size: int = 8
    num_train: int = 800
    num_val: int = 200
    height: int = 64
    width: int = 96

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """The metrics of the tasks."""
        channels = {name: target.channels for name, target in ROOMS.chosen_tasks(self.tasks).items()}
        metrics = {k: v for name, number in channels.items() for k, v in make_metrics(name, number, "batch").items()}
        return {name: bool(metric.higher_is_better) for name, metric in metrics.items()}

    def make_model(self, tasks: Sequence[str], method: Aggregator | Scalarizer | None) -> NYUv2Model:
        """A fresh model."""
        schedule = {"lr": self.lr, "lr_milestones": self.lr_milestones, "lr_factor": 0.3}
        return _RoomsModel(tasks, "segnet", self.widths, mtl_method=method, **schedule)

    def make_data(self, tasks: Sequence[str], seed: int) -> RoomsDataModule:
        """The same rooms for every seed, in another order. Augmentation costs more epochs than there are here."""
        size = (self.num_train, self.num_val, self.height, self.width)
        return RoomsDataModule(tasks, size, batch_size=self.batch_size, augment=False, seed=seed)

    def make_callbacks(self, folder: Path) -> list[Callback]:
        """What is predicted after the last epoch, and which classes are taken for which."""
        return [DensePictures(self.epochs, 4, folder), ConfusionMatrixPlot(self.epochs, folder)]


# Ten looks an epoch.
PROBLEMS = {
    "rooms": RoomsProblem(title="rooms, drawn", tasks=tuple(ROOMS.tasks), epochs=5, evaluations=5, look_every=10)
}
