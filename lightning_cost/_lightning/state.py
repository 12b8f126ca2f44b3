"""What modules hold apart from their parameters, so that evaluating them leaves no trace."""

from __future__ import annotations

import copy
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

__all__: list[str] = []

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_CONTAINERS = (list, set, deque)
_UNCHANGING = frozenset({bool, int, float, str, tuple, type(None), torch.dtype, torch.device})


class _Values:
    """The values of some tensors.

    A module has dozens of tiny tensors: buffers, and the states of its metrics. Copying each by itself takes as long as
    a part of the step, on a GPU even more.

    Args:
        tensors: Tensors of the ordinary layout. One may occur twice.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        groups: dict[tuple[torch.dtype, torch.device], dict[int, Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), {})[id(tensor)] = tensor
        self._groups = [list(group.values()) for group in groups.values()]
        values = [torch.cat([tensor.detach().reshape(-1) for tensor in group]) for group in self._groups]
        self._pieces = [
            [
                piece.view(tensor.shape)
                for piece, tensor in zip(value.split([t.numel() for t in group]), group, strict=True)
            ]
            for value, group in zip(values, self._groups, strict=True)
        ]

    def restore(self) -> None:
        """Set the tensors to what they were."""
        for group, pieces in zip(self._groups, self._pieces, strict=True):
            torch._foreach_copy_(group, pieces)


class BufferState:
    """The values of the buffers of some modules, including buffers that are ``None``.

    Args:
        modules: The modules.

    Attributes:
        places: The dictionary of buffers of each module, and what it holds now.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.places = [(owner._buffers, dict(owner._buffers)) for owner in modules]
        self._values = _Values(b for _, buffers in self.places for b in buffers.values() if b is not None)

    def restore(self) -> None:
        """Set the buffers to what they were, and remove those that were not there."""
        self.restore_places()
        self.restore_values()

    def restore_places(self) -> None:
        """Put back the tensors themselves, whatever their values are."""
        for now, buffers in self.places:
            if not _are_the_same(now, buffers):
                for name in now.keys() - buffers.keys():
                    del now[name]
                now.update(buffers)

    @torch.no_grad()
    def restore_values(self) -> None:
        """Set the tensors to what they were."""
        self._values.restore()


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Undo on exit what a backward pass does to the buffers of a module: activation checkpointing evaluates it again.

    A graph that has saved a buffer stays valid: it is written without counting as a change.
    """
    values = _Values(buffer.data for buffer in module.buffers() if not buffer.is_inference())
    try:
        yield
    finally:
        values.restore()


class ModuleState:
    """What some modules hold now apart from trained parameters: buffers, attributes, containers, random generators.

    Attributes are restored to the objects that they were. Of these objects, tensors, lists, dictionaries, sets and
    random generators also get back their content. An object of another kind keeps what evaluations did to it.

    Args:
        modules: The modules.
        written: Parameters that are not trained but written, such as a moving average of weights.
    """

    def __init__(self, modules: Iterable[nn.Module], written: Iterable[Parameter] = ()) -> None:
        parts = list(modules)
        self._buffers = BufferState(parts)
        self._attributes = [(vars(part), dict(vars(part))) for part in parts]
        self._tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        tensors, self._contents = list[Tensor](written), list[Callable[[], object]]()
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                if type(value) in _UNCHANGING or name in _OF_EVERY_MODULE:
                    continue
                if type(value) is Tensor and value.layout is torch.strided and not value.requires_grad:
                    tensors.append(value)
                elif isinstance(value, dict):
                    self._tables.append((value, dict(value)))
                else:
                    undo = _undo(value)
                    if undo is not None:
                        self._contents.append(undo)
        self._values = _Values(tensors)
        self._dictionaries = [now for now, _ in (*self._buffers.places, *self._attributes, *self._tables)]
        self._entries = list(_names_and_values(self._dictionaries))

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what has happened since."""
        # Most evaluations put no other object anywhere. One look at all dictionaries is faster than one at each.
        unchanged = 2 * sum(map(len, self._dictionaries)) == len(self._entries) and all(
            map(is_, _names_and_values(self._dictionaries), self._entries)
        )
        if not unchanged:
            self._restore_entries()
        self._buffers.restore_values()
        self._values.restore()
        for undo in self._contents:
            undo()

    def _restore_entries(self) -> None:
        self._buffers.restore_places()
        for now, attributes in self._attributes:
            if _are_the_same(now, attributes):
                continue
            # Only what differs: compiled code checks whether a dictionary has been written to.
            for name in now.keys() - attributes.keys():
                # A function is no state: somebody has replaced a method.
                if not inspect.isroutine(now[name]):
                    del now[name]
            for name, value in attributes.items():
                if (name not in now or now[name] is not value) and not inspect.isroutine(value):
                    now[name] = value
        for table, content in self._tables:
            if not _are_the_same(table, content):
                table.clear()
                table.update(content)


def _names_and_values(attributes: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(part for these in attributes for part in (these, these.values()))


def _are_the_same(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    return len(now) == len(before) and all(map(is_, _names_and_values([now]), _names_and_values([before])))


def _undo(value: object) -> Callable[[], object] | None:
    """What restores the content of an attribute; ``None`` if it has none that can change."""
    if isinstance(value, Tensor):
        # A tensor with a graph belongs to the step under way. Writing into it would break its backward pass.
        return None if value.requires_grad else partial(_write, value, value.clone())
    if isinstance(value, _CONTAINERS):
        return partial(_refill, value, copy.copy(value))
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.ndarray):
        return partial(np.copyto, value, value.copy())
    return None


def _write(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list) and len(container) == len(content) and all(map(is_, container, content)):
        return
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(content)
    else:
        container.update(content)
