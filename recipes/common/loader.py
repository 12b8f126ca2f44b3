"""Batches of what is in memory, in an order that a seed and the epoch decide, resumable in mid-epoch.

A `DataLoader` collates item by item, which costs more here than the training step; indexing whole tensors does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["BatchLoader", "BatchSampler", "SampledLoader", "TensorLoader"]


class BatchSampler:
    """Yields the indices of one batch after another.

    The order is a function of `shuffle_seed` and the epoch alone, so paired runs see the same batches and torch's
    global generator is left alone. The Trainer calls `set_epoch` on its own; in a loop of your own, call it.

    Args:
        size: Number of examples.
        batch_size: Examples per batch and process.
        shuffle_seed: Seed of the order, at least 0; the incomplete last batch is dropped. None: in the stored order,
            and the last batch is kept.
        rank: Index of this process.
        world_size: Number of processes that share the examples, each taking every `world_size`-th one.

    Raises:
        ValueError: If an argument is out of range, or not even one batch would come out.
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
        # A generator: Lightning asks for iterators that it drops, and for this epoch's before it calls `set_epoch`.
        # Nothing may happen before the first batch is drawn.
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
        """Epoch, how many of its batches were handed out, and what decides which they were."""
        return {"epoch": self._epoch, "served": self._served, "batches": len(self), **self._settings()}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Let the next pass over the saved epoch begin where the saved one was.

        Raises:
            ValueError: If that is in the middle of a pass over other batches.
        """
        epoch, served = state["epoch"], state["served"]
        assert epoch is not None
        assert served is not None
        others = [name for name, value in self._settings().items() if state[name] != value]
        is_complete = served == state["batches"]
        if others and served and not is_complete:
            saved, here = ({name: values[name] for name in others} for values in (state, self._settings()))
            raise ValueError(
                f"The checkpoint is from the middle of an epoch of other batches: {saved} there, {here} here. Go on"
                " with what it has, or from the end of an epoch."
            )
        self._epoch, self._served = epoch, len(self) if is_complete else served
        self._skip = self._served

    def _settings(self) -> dict[str, int | None]:
        return {
            "size": self.size,
            "batch_size": self.batch_size,
            "shuffle_seed": self.shuffle_seed,
            "world_size": self.world_size,
        }


class SampledLoader(ABC):
    """Serves the batches that a sampler decides; Lightning saves and restores its position.

    It is no `DataLoader`, so that Lightning gives it no sampler of its own on several devices.

    Args:
        sampler: What decides the batches. Named as in a `DataLoader`, where Lightning looks for `set_epoch`.
    """

    batch_sampler = None  # Lightning reads it of whatever has a sampler.

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.sampler)

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch; each is drawn from the sampler when it is handed out."""

    def state_dict(self) -> dict[str, int | None]:
        """State of the sampler."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Restore the sampler."""
        self.sampler.load_state_dict(state)


class BatchLoader(SampledLoader):
    """Serves batches that a function puts together.

    Args:
        fetch: The indices of a batch (B,) to the batch.
        sampler: See `SampledLoader`.
    """

    def __init__(self, fetch: Callable[[Tensor], Any], sampler: BatchSampler) -> None:
        super().__init__(sampler)
        self.fetch = fetch

    def __iter__(self) -> Iterator[Any]:
        return map(self.fetch, self.sampler)


class TensorLoader(BatchLoader):
    """Serves dicts of equally long tensors.

    Args:
        tensors: Name to tensor, examples along the first dimension.
        sampler: See `SampledLoader`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], sampler: BatchSampler) -> None:
        self.tensors = dict(tensors)
        super().__init__(lambda index: {name: tensor[index] for name, tensor in self.tensors.items()}, sampler)
