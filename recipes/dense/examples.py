"""Examples read from disk, and batches of them in an order and under an augmentation that a seed decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.common.loader import BatchSampler, SampledLoader
from recipes.dense.augment import View, augment
from recipes.dense.check import checked_values
from recipes.dense.layout import Layout

__all__ = ["DenseExamples", "ExampleLoader", "Place"]

Place = tuple[int, int]
"""Epoch and number of an example: all that its augmentation depends on, besides the seed."""


class DenseExamples(Dataset[dict[str, Tensor]]):
    """Examples of one split; a place gives `image` (3, H, W) and each task's target, (H, W) or (channels, H, W).

    Args:
        folder: Folder of the split.
        layout: The benchmark.
        tasks: Tasks whose targets to read.
        size: Number of examples.
        augment_seed: Seed of the augmentation; None: examples as they are on disk.
    """

    def __init__(
        self, folder: Path, layout: Layout, tasks: Sequence[str], size: int, augment_seed: int | None = None
    ) -> None:
        self.folder, self.quantities, self.size = folder, layout.files(tasks), size
        self.augment_seed = augment_seed

    def __len__(self) -> int:
        """Number of examples."""
        return self.size

    def __getitem__(self, place: Place) -> dict[str, Tensor]:
        """Read an example, and augment it.

        Raises:
            ValueError: If an array has values that it must not have; the message names the file.
        """
        epoch, number = place
        example = {}
        for name, quantity in self.quantities.items():
            path = self.folder / quantity.folder / f"{number}.npy"
            # Mapping it into memory was measured to be no faster: all of it is read.
            example[name] = quantity.to_tensor(checked_values(np.load(path), path, quantity))
        if self.augment_seed is None:
            return example
        # The last number, because trailing zeros make no difference: the order of the epoch is drawn from the first
        # two alone.
        rng = np.random.default_rng((self.augment_seed, epoch, number, 1))
        return augment(example, View.draw(rng, *example["image"].shape[-2:]))


class ExampleLoader(SampledLoader):
    """Serves batches of examples, read in worker processes.

    Args:
        examples: What to serve.
        sampler: See `SampledLoader`.
        num_workers: Worker processes; 0: this one reads.
        pin_memory: Whether batches are to be copied to a CUDA device.
    """

    def __init__(
        self, examples: DenseExamples, sampler: BatchSampler, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        super().__init__(sampler)
        self._batches = DataLoader(
            examples,
            batch_sampler=_PlacesAhead(sampler),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            # It would draw from the global one for every pass.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # Workers are ahead. The sampler, whose position is saved, counts what was handed out.
        for _, batch in zip(self.sampler, self._batches, strict=True):
            yield batch


class _PlacesAhead:
    """The batches that a sampler is about to hand out, without making it hand them out."""

    def __init__(self, sampler: BatchSampler) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Place]]:
        # Copied now: the sampler forgets where it was to begin as soon as it hands out its first batch.
        sampler = copy(self._sampler)
        epoch = sampler.state_dict()["epoch"]
        return ([(epoch, number) for number in batch.tolist()] for batch in sampler)
