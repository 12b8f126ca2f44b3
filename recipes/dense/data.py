"""The data module of dense benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, get_args

import lightning as L
from lightning.pytorch.accelerators import CUDAAccelerator
from rich.console import Console

from recipes.common.loader import BatchSampler
from recipes.dense.check import check_files, check_values
from recipes.dense.examples import DenseExamples, ExampleLoader
from recipes.dense.layout import Layout

__all__ = ["Check", "DenseDataModule"]

Check = Literal["files", "full"]
Split = Literal["train", "val"]


class DenseDataModule(L.LightningDataModule):
    """Images with targets for every pixel, from .npy files.

    A batch is a dict of `image` (B, 3, H, W) and the targets of the tasks: `segmentation` (B, H, W) int64, `depth`
    (B, 1, H, W) and `normals` (B, 3, H, W). `seed` and the epoch alone decide the order of the training batches and
    the augmentation of every example, whatever the number of workers or devices. So runs with the same seed see the
    same pixels. The global random number generators are left alone.

    These benchmarks have two splits, and their tables report what they call `val`. So this split is used to validate
    and to test. Do not choose anything by it, such as the best epoch: you would choose on the test data.

    Args:
        root: Folder that contains `train` and `val`.
        batch_size: Examples per batch and process; None: as published. An incomplete last training batch is dropped.
        tasks: Tasks whose targets a batch has; None: all tasks of the benchmark.
        num_workers: Number of worker processes that read each split; 0: the training process reads.
        augment: Whether to scale, crop and mirror training examples.
        seed: Seed of the order and of the augmentation.
        check: What is checked before training. "files": file names, and the shapes and types in the headers. "full":
            all values as well, which reads everything. The values of an example are checked whenever it is read.

    Attributes:
        layout: The benchmark.

    Raises:
        ValueError: If an argument is out of range or names an unknown task; in `setup`, if a file is malformed.
        FileNotFoundError: In `setup`, if a folder or a file is missing.
    """

    layout: ClassVar[Layout]

    def __init__(
        self,
        root: str | Path,
        batch_size: int | None = None,
        tasks: Sequence[str] | None = None,
        num_workers: int = 0,
        augment: bool = True,
        seed: int = 0,
        check: Check = "files",
    ) -> None:
        super().__init__()
        batch_size = self.layout.batch_size if batch_size is None else batch_size
        # Checkpoints keep the arguments, but PyTorch loads no paths from them, and the data may have moved. The model
        # has `tasks` too, and Lightning refuses to log an argument that two modules spell differently.
        self.save_hyperparameters(ignore=["root", "tasks"])
        for name, minimum in {"batch_size": 1, "num_workers": 0, "seed": 0}.items():
            if self.hparams[name] < minimum:
                raise ValueError(f"{name}={self.hparams[name]} must be at least {minimum}.")
        if check not in get_args(Check):
            raise ValueError(f"check={check!r} must be one of {get_args(Check)}.")
        self.root, self.tasks = Path(root).expanduser(), tuple(self.layout.chosen_tasks(tasks))
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.augment, self.check = augment, check
        self.sizes: dict[Split, int] = {}

    def setup(self, stage: str) -> None:
        """Check the files of the splits that the stage needs, each split once."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"root={str(self.root)!r} must be a folder. {self.layout.tree}")
        splits: tuple[Split, ...] = ("train", "val") if stage == "fit" else ("val",)
        for split in splits:
            if split not in self.sizes:
                folder = self.root / split
                size = check_files(folder, self.layout, self.tasks)
                if self.check == "full":
                    quiet = self.trainer is not None and not self.trainer.is_global_zero
                    check_values(folder, self.layout, self.tasks, size, Console(stderr=True, quiet=quiet))
                self.sizes[split] = size

    def train_dataloader(self) -> ExampleLoader:
        """Shuffled and augmented training batches."""
        return self._loader("train")

    def val_dataloader(self) -> ExampleLoader:
        """Validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> ExampleLoader:
        """The validation batches, which these benchmarks report."""
        return self._loader("val")

    def _loader(self, split: Split) -> ExampleLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        shuffle_seed = self.seed if split == "train" else None
        augment_seed = shuffle_seed if self.augment else None
        size = self.sizes[split]
        examples = DenseExamples(self.root / split, self.layout, self.tasks, size, augment_seed)
        sampler = BatchSampler(size, self.batch_size, shuffle_seed, rank, world_size)
        on_cuda = self.trainer is not None and isinstance(self.trainer.accelerator, CUDAAccelerator)
        return ExampleLoader(examples, sampler, self.num_workers, pin_memory=on_cuda)
