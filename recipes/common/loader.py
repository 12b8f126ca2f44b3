"""Seeded batches of data in memory. A run can resume in the middle of an epoch.

A `DataLoader` collates item by item, which takes longer here than the training step. Indexing whole tensors does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.common.interruption import stop_if_interrupted

__all__ = ["BatchLoader", "BatchSampler", "SampledLoader"]


class BatchSampler:
    """Yields the indices of one batch after another.

    The order depends only on `shuffle_seed` and the epoch, so paired runs see the same batches. The global generator of
    torch is not used. The Trainer calls `set_epoch`; in a loop of your own, call it yourself.

    Args:
        size: Number of examples.
        batch_size: Examples per batch and process.
        shuffle_seed: Seed of the order, at least 0; an incomplete last batch is dropped. None: the stored order, and
            the last batch is kept.
        rank: Index of this process.
        world_size: Number of processes that share the examples. Each takes every `world_size`-th one.

    Raises:
        ValueError: If an argument is out of range, or there would be no batch.
    """

    def __init__(
        self, size: int, batch_size: int, shuffle_seed: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        if shuffle_seed is not None and shuffle_seed < 0:
            raise ValueError(f"shuffle_seed={shuffle_seed} must be at least 0.")
        share = size // world_size if shuffle_seed is not None else len(range(rank, size, world_size))
        self._num_batches = share // batch_size if shuffle_seed is not None else -(-share // batch_size)
        if self._num_batches == 0:
            raise ValueError(
                f"batch_size={batch_size} leaves no batch: process {rank} of {world_size} has {share} of {size}"
                " examples. Lower batch_size or ask for more examples."
            )
        self.size, self.batch_size, self.shuffle_seed = size, batch_size, shuffle_seed
        self.rank, self.world_size = rank, world_size
        self._epoch = self._served = self._skip = 0

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return self._num_batches

    def __iter__(self) -> Iterator[Tensor]:
        # A generator does nothing before its first batch is drawn. Lightning creates iterators that it does not use,
        # and creates the one of an epoch before it calls `set_epoch`.
        first, self._skip = self._skip, 0
        order = self._order()[self.rank :: self.world_size]
        for batch in range(first, len(self)):
            self._served = batch + 1
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _order(self) -> Tensor:
        if self.shuffle_seed is None:
            return torch.arange(self.size)
        return torch.from_numpy(np.random.default_rng((self.shuffle_seed, self._epoch)).permutation(self.size))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        if epoch != self._epoch:
            self._epoch, self._served, self._skip = epoch, 0, 0

    def state_dict(self) -> dict[str, int | None]:
        """The epoch, the number of its batches that were served, and the settings."""
        return {"epoch": self._epoch, "served": self._served, "batches": len(self), **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the saved epoch where it was.

        Raises:
            ValueError: If the state is from the middle of an epoch with other settings.
        """
        is_complete = state["served"] == state["batches"]
        others = {name: (state[name], here) for name, here in self._settings().items() if state[name] != here}
        if others and state["served"] and not is_complete:
            raise ValueError(
                f"The checkpoint is from the middle of an epoch of other batches (saved, here): {others}. Use the"
                " settings of the checkpoint, or a checkpoint from the end of an epoch."
            )
        self._epoch = state["epoch"]
        self._served = self._skip = len(self) if is_complete else state["served"]

    def _settings(self) -> dict[str, int | None]:
        return {name: getattr(self, name) for name in ("size", "batch_size", "shuffle_seed", "world_size")}


class SampledLoader(ABC):
    """Serves the batches of a sampler. Lightning saves and restores its position.

    It is not a `DataLoader`, so Lightning does not replace its sampler on several devices.

    Args:
        sampler: Decides the batches. It has the name that it has in a `DataLoader`: there Lightning finds `set_epoch`.
    """

    batch_sampler = None  # Lightning reads it from every loader with a sampler.

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch. Each is drawn from the sampler when it is served.

        Between two batches a training can be interrupted and resumed without a loss.
        """
        batches = self.batches()
        while True:
            stop_if_interrupted()
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """The batches of an epoch."""

    def state_dict(self) -> dict[str, int | None]:
        """State of the sampler."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the sampler."""
        self.sampler.load_state_dict(state)


class BatchLoader(SampledLoader):
    """Serves the batches that `fetch` makes from the indices (B,) of the sampler."""

    def __init__(self, fetch: Callable[[Tensor], Any], sampler: BatchSampler) -> None:
        super().__init__(sampler)
        self.fetch = fetch

    def batches(self) -> Iterator[Any]:
        """What `fetch` makes of each batch of the sampler."""
        return map(self.fetch, self.sampler)
