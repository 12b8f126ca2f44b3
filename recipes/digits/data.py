"""Overlaid pairs of handwritten digits, with the targets of some tasks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from recipes.common.loader import BatchLoader, BatchSampler
from recipes.digits.tasks import Digits, chosen_tasks

__all__ = ["DigitsDataModule", "make_pairs", "source_digits"]

Split = Literal["train", "val", "test"]
SPLIT_SIZES: dict[Split, int] = {"train": 1000, "val": 350, "test": 447}
CANVAS = 12
DIGIT = 8


def source_digits(split: Split) -> Tensor:
    """Rows of `sklearn.datasets.load_digits` that belong to a split. They do not depend on a seed."""
    order = torch.randperm(sum(SPLIT_SIZES.values()), generator=torch.Generator().manual_seed(1234))
    return dict(zip(SPLIT_SIZES, order.split(list(SPLIT_SIZES.values())), strict=True))[split]


@cache
def _all_digits() -> Digits:
    # Parsing the file takes longer than a short training.
    digits = load_digits()
    return Digits(torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target).long())


def make_pairs(split: Split, num: int, seed: int = 0, tasks: Sequence[str] = ("left", "right")) -> dict[str, Tensor]:
    """Draw pairs of digits with replacement, and overlay them.

    The left digit fills the top left 8 x 8 pixels of a 12 x 12 canvas, and the right digit the bottom right ones. Where
    they overlap, the brighter pixel wins.

    Args:
        split: Which source digits to draw from.
        num: Number of pairs.
        seed: Seed of the pairs; each split has its own random numbers.
        tasks: Names of `TASKS`.

    Returns:
        `image` (num, 1, 12, 12) in [0, 1], and each task's target (num,).

    Raises:
        ValueError: If `tasks` is empty, names an unknown task, or one twice.
    """
    chosen = chosen_tasks(tasks)
    source, rows = _all_digits(), source_digits(split)
    generator = torch.Generator().manual_seed(3 * seed + 1 + list(SPLIT_SIZES).index(split))
    drawn = [rows[torch.randint(len(rows), (num,), generator=generator)] for _ in range(2)]
    left, right = (Digits(source.images[side], source.classes[side]) for side in drawn)

    canvas = torch.zeros(2, num, CANVAS, CANVAS)
    canvas[0, :, :DIGIT, :DIGIT] = left.images
    canvas[1, :, -DIGIT:, -DIGIT:] = right.images
    image = canvas.amax(0).unsqueeze(1)
    return {"image": image} | {name: task.target(left, right) for name, task in chosen.items()}


class DigitsDataModule(L.LightningDataModule):
    """Overlaid digits. A batch is a dict of `image` and the target of each task.

    Args:
        batch_size: Pairs per batch and process. An incomplete last training batch is dropped.
        tasks: Names of `TASKS`, including all tasks of the model.
        num_train: Number of training pairs.
        num_val: Number of validation pairs.
        num_test: Number of test pairs.
        seed: Seed of the pairs. The split of the source digits does not depend on it.
        shuffle_seed: Seed of the order of the training batches. Runs with the same seed see the same batches.

    Raises:
        ValueError: If an argument is out of range or names an unknown task.
    """

    def __init__(
        self,
        batch_size: int = 64,
        *,
        tasks: Sequence[str] = ("left", "right"),
        num_train: int = 4000,
        num_val: int = 1000,
        num_test: int = 2000,
        seed: int = 0,
        shuffle_seed: int = 0,
    ) -> None:
        super().__init__()
        least = {"batch_size": 1, "num_train": 1, "num_val": 1, "num_test": 1, "seed": 0, "shuffle_seed": 0}
        # The model saves its tasks too, and Lightning refuses to log two different values of the same name.
        self.save_hyperparameters(ignore="tasks")
        for name, minimum in least.items():
            if self.hparams[name] < minimum:
                raise ValueError(f"{name}={self.hparams[name]} must be at least {minimum}.")
        if num_train < batch_size:
            raise ValueError(
                f"num_train={num_train} must be at least batch_size={batch_size}: an incomplete batch is dropped."
            )
        chosen_tasks(tasks)
        self.batch_size, self.tasks, self.seed, self.shuffle_seed = batch_size, tuple(tasks), seed, shuffle_seed
        self.sizes: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        self.pairs: dict[Split, dict[str, Tensor]] = {}

    def setup(self, stage: str) -> None:
        """Draw the pairs of all splits, which takes milliseconds."""
        self.pairs = {split: make_pairs(split, num, self.seed, self.tasks) for split, num in self.sizes.items()}

    def train_dataloader(self) -> BatchLoader:
        """Shuffled training batches."""
        return self._loader("train", self.shuffle_seed)

    def val_dataloader(self) -> BatchLoader:
        """Validation batches."""
        return self._loader("val", None)

    def test_dataloader(self) -> BatchLoader:
        """Test batches."""
        return self._loader("test", None)

    def _loader(self, split: Split, shuffle_seed: int | None) -> BatchLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = BatchSampler(self.sizes[split], self.batch_size, shuffle_seed, rank, world_size)
        pairs = self.pairs[split]
        return BatchLoader(lambda index: {name: tensor[index] for name, tensor in pairs.items()}, sampler)
