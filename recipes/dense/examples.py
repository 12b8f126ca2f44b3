"""Examples read from disk, in batches whose order and augmentation a seed decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.common.interruption import ignore_interrupts
from recipes.common.loader import BatchSampler, SampledLoader
from recipes.dense.augment import View, augment
from recipes.dense.check import read_checked
from recipes.dense.layout import Layout

__all__ = ["DenseExamples", "ExampleLoader", "Place"]

Place = tuple[int, int]
"""Epoch and number of an example. Its augmentation depends on these and on the seed alone."""


class DenseExamples(Dataset[dict[str, Tensor]]):
    """Examples of one split. A place gives `image` (3, H, W) and each task's target, (H, W) or (channels, H, W).

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
        return self.size

    def __getitem__(self, place: Place) -> dict[str, Tensor]:
        """Read and augment an example; see `read_checked` for what is refused."""
        epoch, number = place
        example = {
            name: quantity.to_tensor(read_checked(quantity.path(self.folder, number), quantity))
            for name, quantity in self.quantities.items()
        }
        if self.augment_seed is None:
            return example
        # The order of the epoch is drawn from seed and epoch alone. NumPy ignores trailing zeros of a seed, so the 1
        # at the end keeps the two streams apart.
        rng = np.random.default_rng((self.augment_seed, epoch, number, 1))
        return augment(example, View.draw(rng, *example["image"].shape[-2:]))


class ExampleLoader(SampledLoader):
    """Serves batches of examples, which worker processes may read.

    Args:
        examples: What to serve.
        sampler: See `SampledLoader`.
        num_workers: Number of worker processes; 0: this process reads.
        pin_memory: Whether the batches will be copied to a CUDA device.
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
            # Without a generator, the DataLoader draws from the global one for every pass.
            generator=torch.Generator(),
            # Ctrl-C reaches the workers as well, but the batch under way shall be finished.
            worker_init_fn=ignore_interrupts,
        )

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches that the workers have read."""
        # The workers read ahead. The sampler counts the batches that were handed out, and its position is saved.
        for _, batch in zip(self.sampler, self._batches, strict=True):
            yield batch


class _PlacesAhead:
    """The places of a sampler's next batches. Iterating does not move the sampler."""

    def __init__(self, sampler: BatchSampler) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Place]]:
        # Copied now, because the sampler forgets where to begin as soon as it hands out its first batch.
        sampler = copy(self._sampler)
        epoch = sampler.state_dict()["epoch"]
        return ([(epoch, number) for number in batch.tolist()] for batch in sampler)
