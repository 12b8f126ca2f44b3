"""What modules hold apart from their parameters, so that evaluating them leaves no trace."""

from __future__ import annotations

import copy
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

__all__: list[str] = []

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, deque)
_UNCHANGING = frozenset({bool, int, float, str, tuple, type(None), torch.dtype, torch.device})


class BufferState:
    """The values of the buffers of some modules, including buffers that are ``None``.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places = [(owner, dict(owner._buffers)) for owner in modules]
        groups: dict[tuple[torch.dtype, torch.device], dict[int, Tensor]] = {}
        for _, buffers in self._places:
            for buffer in buffers.values():
                if buffer is not None:
                    groups.setdefault((buffer.dtype, buffer.device), {})[id(buffer)] = buffer.detach()
        self._groups = [list(group.values()) for group in groups.values()]
        # A network has dozens of tiny buffers. On a GPU, copying each by itself takes as long as a part of the step.
        self._values = [torch.cat([buffer.reshape(-1) for buffer in group]) for group in self._groups]

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers to what they were, and remove those that were not there."""
        for owner, buffers in self._places:
            for name in owner._buffers.keys() - buffers.keys():
                del owner._buffers[name]
            owner._buffers.update(buffers)
        for group, values in zip(self._groups, self._values, strict=True):
            pieces = values.split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [piece.view(b.shape) for piece, b in zip(pieces, group, strict=True)])


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
        self._attributes = [(part, dict(vars(part))) for part in parts]
        self._contents: list[Callable[[], object]] = [
            partial(_write, parameter, parameter.detach().clone()) for parameter in written
        ]
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                if type(value) in _UNCHANGING or name in _OF_EVERY_MODULE:
                    continue
                undo = _undo(value)
                if undo is not None:
                    self._contents.append(undo)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what has happened since."""
        self._buffers.restore()
        for part, attributes in self._attributes:
            now = vars(part)
            if len(now) == len(attributes) and all(map(is_, now.values(), attributes.values())):
                continue
            # Only what differs: compiled code checks whether a dictionary has been written to.
            for name in now.keys() - attributes.keys():
                # A function is no state: somebody has replaced a method.
                if not inspect.isroutine(now[name]):
                    del now[name]
            for name, value in attributes.items():
                if (name not in now or now[name] is not value) and not inspect.isroutine(value):
                    now[name] = value
        for undo in self._contents:
            undo()


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
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(content)
    else:
        container.update(content)
