"""A multi-task method for some of its tasks, in a step in which the others have no gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cost._training.method_state import derive, remembered_names

__all__: list[str] = []

# Tensors with a row and a column for each task.
_SQUARE = frozenset({"_phi_t", "init_gtg"})
_COUNTS = frozenset({"_n_tasks"})


@contextmanager
def narrowed(method: nn.Module, kept: Sequence[int], num_tasks: int) -> Iterator[None]:
    """Make a method of TorchJD work on some of its tasks for a while. The others rest.

    Whatever has an entry for each task, in options, memory and parameters, is narrowed to the tasks that are kept. On
    exit the entries of the others are what they were. A method that has no memory yet starts it in a later step, with
    all tasks.

    Args:
        method: The method.
        kept: Indices of the tasks that are kept, in order.
        num_tasks: Number of all tasks.
    """
    parts = [part for part in method.modules() if _is_of_torchjd(part)] if len(kept) < num_tasks else []
    stores = [store for part in parts for store in (vars(part), part._buffers, part._parameters)]
    before: list[dict[str, Any]] = [dict(store) for store in stores]
    for store in stores:
        for name, value in store.items():
            store[name] = _narrow(name, value, kept, num_tasks)
    for part in parts:
        derive(part)
    try:
        yield
    finally:
        for index, part in enumerate(parts):
            names = remembered_names(part)
            for store, old in list(zip(stores, before, strict=True))[3 * index : 3 * index + 3]:
                new = dict(store)
                store.clear()
                store.update(old)
                for name in names & old.keys() & new.keys():
                    store[name] = _widen(name, old[name], new[name], kept, num_tasks)
        for part in parts:
            derive(part)


def _is_of_torchjd(part: nn.Module) -> bool:
    return any(base.__module__.startswith("torchjd.") for base in type(part).__mro__)


def _narrow(name: str, value: Any, kept: Sequence[int], num_tasks: int) -> Any:
    if name in _COUNTS and value == num_tasks:
        return len(kept)
    if isinstance(value, list):
        return [_narrow(name, entry, kept, num_tasks) for entry in value]
    if not _has_entries(value, num_tasks):
        return value
    chosen: Any = list(kept)
    narrow = value[chosen]
    return narrow[:, chosen] if name in _SQUARE else narrow


def _widen(name: str, old: Any, new: Any, kept: Sequence[int], num_tasks: int) -> Any:
    """What a part remembers after it has worked on the kept tasks only."""
    if isinstance(old, (Tensor, np.ndarray)):
        if not _has_entries(old, num_tasks):
            return new
        if type(new) is not type(old) or len(new) != len(kept):
            return old
        wide: Any = old.clone() if isinstance(old, Tensor) else old.copy()
        chosen: Any = list(kept)
        if name in _SQUARE:
            rows = torch.tensor(chosen)
            wide[rows[:, None], rows[None, :]] = new
        else:
            wide[chosen] = new
        return wide
    # A memory that began with fewer tasks would not fit the next step.
    return old if old is None and isinstance(new, (Tensor, np.ndarray)) else new


def _has_entries(value: Any, num_tasks: int) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0 and len(value) == num_tasks
