"""What studies and the demo train on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from recipes.celeba import CelebADataModule
from recipes.celeba.attributes import ATTRIBUTES
from recipes.celeba.problems import CelebAProblem
from recipes.common.files import user_cache
from recipes.dense.data import DenseDataModule
from recipes.dense.model import DenseModel, Network
from recipes.dense.problem import DenseProblem
from recipes.nyuv2 import NYUV2, NYUv2DataModule, NYUv2Model
from recipes.scenes.writers import write_celeba, write_nyuv2

__all__ = ["PROBLEMS", "ROOMS", "FacesDataModule", "FacesProblem", "RoomsDataModule", "RoomsProblem"]

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
class RoomsProblem(DenseProblem):
    """Segmentation, depth and surface normals of rooms, by a SegNet.

    Attributes:
        num_train: Number of rooms to train on.
        num_val: Number of rooms to validate on, and to test on: the layout has two splits.
        height: Rows of the images, a multiple of 32.
        width: Columns of the images, a multiple of 32.
    """

    model: ClassVar[type[DenseModel]] = _RoomsModel
    data: ClassVar[type[DenseDataModule]] = RoomsDataModule

    network: Network = "segnet"
    widths: tuple[int, ...] = (16, 32, 32, 64, 64)
    lr: float = 2e-3
    lr_milestones: tuple[int, ...] = (4,)
    lr_factor: float = 0.3
    num_workers: int = 0
    # It costs more epochs than there are here.
    augment: bool = False
    num_train: int = 800
    num_val: int = 200
    height: int = 64
    width: int = 96

    def make_data(self, tasks: Sequence[str], seed: int) -> RoomsDataModule:
        """The same rooms for every seed, in another order."""
        size = (self.num_train, self.num_val, self.height, self.width)
        return RoomsDataModule(tasks, size, batch_size=self.batch_size, augment=self.augment, seed=seed)


class FacesDataModule(CelebADataModule):
    """Faces in CelebA's layout, drawn into the user's cache when they are first needed. See `RoomsDataModule`.

    Args:
        size: Numbers of training, validation and test faces.
        **kwargs: See `CelebADataModule`.
    """

    def __init__(self, size: tuple[int, int, int], **kwargs: Any) -> None:
        self._size = size
        super().__init__(user_cache("scenes") / f"faces-{'-'.join(map(str, size))}", **kwargs)

    def prepare_data(self) -> None:
        """Draw the faces that are missing, and resize them unless this was done already."""
        write_celeba(Path(self.root), *self._size, jobs=os.cpu_count() or 1, console=Console(stderr=True))
        super().prepare_data()


@dataclass(frozen=True, kw_only=True)
class FacesProblem(CelebAProblem):
    """Attributes of drawn faces.

    Attributes:
        num_train: Number of faces to train on.
        num_val: Number of faces to validate on.
        num_test: Number of faces to test on.
    """

    width: int = 8
    lr: float = 2e-3
    batch_size: int = 64
    image_size: int = 32
    num_train: int = 4000
    num_val: int = 500
    num_test: int = 500

    def make_data(self, tasks: Sequence[str], seed: int) -> FacesDataModule:
        """The same faces for every seed, in another order."""
        size = (self.num_train, self.num_val, self.num_test)
        return FacesDataModule(size, batch_size=self.batch_size, image_size=self.image_size, shuffle_seed=seed)


# Ten looks an epoch.
PROBLEMS = {
    "rooms": RoomsProblem(title="rooms, drawn", tasks=tuple(ROOMS.tasks), epochs=5, evaluations=5, look_every=10),
    "faces": FacesProblem(title="faces, drawn", tasks=ATTRIBUTES, epochs=5, evaluations=5, look_every=6),
}
