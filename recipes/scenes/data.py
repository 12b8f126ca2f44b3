"""The rooms as a data module."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from recipes.common.files import user_cache
from recipes.nyuv2 import NYUV2, NYUv2DataModule
from recipes.scenes.writers import write_nyuv2

__all__ = ["ROOMS", "RoomsDataModule"]

ROOMS = replace(NYUV2, name="Drawn rooms")
"""NYUv2's files, which must not be taken for NYUv2."""


class RoomsDataModule(NYUv2DataModule):
    """Rooms in NYUv2's layout, drawn when they are first needed.

    They are drawn by processes of their own, so that a script needs its `if __name__ == "__main__":`.

    Args:
        tasks: See `DenseDataModule`.
        num_train: Number of training examples.
        num_val: Number of validation examples.
        height: Rows of the images.
        width: Columns of the images.
        batch_size: See `DenseDataModule`.
        augment: See there.
        seed: Seed of the order and of the augmentation; the rooms are always the same.
        cache_dir: Folder that has one folder a size; None: `lightning_cost/scenes` in `$XDG_CACHE_HOME`, which is
            `~/.cache` unless set.
    """

    layout = ROOMS

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        num_train: int = 800,
        num_val: int = 200,
        height: int = 96,
        width: int = 128,
        batch_size: int = 8,
        augment: bool = True,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        # Checkpoints keep the arguments, and PyTorch loads no paths from them.
        cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        folder = f"rooms-{num_train}-{num_val}-{height}x{width}"
        root = Path(cache_dir or user_cache("scenes")) / folder
        super().__init__(root, batch_size, tasks=tasks, augment=augment, seed=seed)
        self._size = (num_train, num_val, height, width)

    def prepare_data(self) -> None:
        """Draw the rooms that are missing."""
        write_nyuv2(self.root, *self._size, jobs=os.cpu_count() or 1, console=Console(stderr=True))
