"""Recorded batches, and evaluating them again without leaving a trace in the module."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_cost._lightning.rng import RngState, preserved_rng
from lightning_cost._lightning.state import ModuleState

__all__: list[str] = []

# Deeper than any batch. It ends the walk through objects that refer to each other.
_DEPTH = 8


class Scene:
    """Everything that ``task_losses`` sees, right before it runs.

    The containers of the batch are copied, its tensors are not: ``batch.pop("labels")`` leaves the copy alone.

    Args:
        module: The module.
        batch: The batch.
        batch_idx: Its index in the epoch.
        clone: Whether to copy the tensors of the batch as well, because ``task_losses`` changes them in place.
        written: Frozen parameters that ``task_losses`` writes.
        thorough: Whether to notice also what is written into frozen parameters through ``.data``.
    """

    # Compiled code cannot copy whatever a module holds.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __init__(
        self,
        module: nn.Module,
        batch: Any,
        batch_idx: int,
        clone: bool = False,
        written: Collection[Parameter] = (),
        thorough: bool = False,
    ) -> None:
        self.batch_idx = batch_idx
        self.rng = RngState.capture()
        self._module = ModuleState(module.modules(), written)
        frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad and p not in written}
        self._frozen = [(name, p, _version(p), p.data_ptr()) for name, p in frozen.items()]
        self._norms = _norms(frozen.values()) if thorough else []
        self._batch = copied(batch, clone)
        self._clone = clone
        self._versions = [(path, tensor, _version(tensor)) for path, tensor in tensors_of(self._batch)]

    def changed_tensor(self) -> str | None:
        """The path of a tensor of the batch that has been changed in place since; ``None`` if there is none."""
        for path, tensor, version in self._versions:
            if _version(tensor) != version:
                return path
        return None

    def written_parameters(self) -> dict[str, Parameter]:
        """The frozen parameters that have been written since, by name."""
        found = {name: p for name, p, version, place in self._frozen if (_version(p), p.data_ptr()) != (version, place)}
        if self._norms:
            pairs = zip(self._frozen, self._norms, _norms(p for _, p, _, _ in self._frozen), strict=True)
            found |= {name: p for (name, p, _, _), before, after in pairs if before != after}
        return found

    def restore(self) -> Any:
        """Set the module and the random generators to what they were.

        Returns:
            A batch like the one that was there.
        """
        self._module.restore()
        self.rng.restore()
        return copied(self._batch, self._clone)


@dataclass(frozen=True)
class RecordedBatch:
    """A batch that ``task_losses`` has seen.

    Attributes:
        scene: What it saw.
        losses: The losses by task, without graph.
        changed_tensor: The path of a tensor of the batch, or the name of a frozen parameter, that it changed in place
            before anybody had a copy. The batch cannot be evaluated again then.
    """

    scene: Scene
    losses: Mapping[str, Tensor]
    changed_tensor: str | None = None


@contextmanager
def preserved(module: LightningModule, written: Collection[Parameter] = ()) -> Iterator[None]:
    """Undo on exit what evaluating training batches does to a module, gradients aside.

    Buffers (such as running statistics), the states of torchmetrics metrics, other attributes and the global random
    generators are restored. Training modes stay as they are, because batch statistics and dropout belong to the losses
    that the optimizer sees.

    Args:
        module: The module.
        written: Frozen parameters that are restored as well.
    """
    state = ModuleState(module.modules(), written)
    with preserved_rng():
        try:
            yield
        finally:
            state.restore()


def copied(value: Any, clone: bool = False, depth: int = 0) -> Any:
    """A batch with containers of its own: dictionaries, lists, tuples, and objects that hold tensors.

    Args:
        value: The batch, or a part of it.
        clone: Whether it gets tensors of its own as well.
        depth: How deep in the batch the part is.
    """
    if isinstance(value, Tensor):
        return value.clone() if clone else value
    if depth > _DEPTH or isinstance(value, (nn.Module, type)) or inspect.isroutine(value):
        return value
    if isinstance(value, dict):
        result = copy.copy(value)
        for key, entry in value.items():
            result[key] = copied(entry, clone, depth + 1)
        return result
    if isinstance(value, (list, tuple)):
        entries = [copied(entry, clone, depth + 1) for entry in value]
        if hasattr(value, "_fields"):
            return type(value)(*entries)
        return type(value)(entries) if type(value) in (list, tuple) else copy.copy(value)
    if not hasattr(value, "__dict__"):
        return value
    # A class of batches: a dataclass, `BatchEncoding` of transformers, or `Data` of torch_geometric.
    if hasattr(value, "__copy__"):
        return copy.deepcopy(value) if clone else copy.copy(value)
    result = copy.copy(value)
    for name, entry in vars(value).items():
        object.__setattr__(result, name, copied(entry, clone, depth + 1))
    return result


def tensors_of(value: Any, path: str = "batch", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a batch, with their paths."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if depth > _DEPTH or isinstance(value, (nn.Module, type)) or inspect.isroutine(value):
        return
    parts: Iterable[tuple[str, Any]] = ()
    if not isinstance(value, Mapping) and hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        parts = ((f"{path}[{key!r}]", entry) for key, entry in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((f"{path}[{index}]", entry) for index, entry in enumerate(value))
    elif hasattr(value, "__dict__"):
        parts = ((f"{path}.{name}", entry) for name, entry in vars(value).items())
    for name, entry in parts:
        yield from tensors_of(entry, name, depth + 1)


def _norms(parameters: Iterable[Parameter]) -> list[float]:
    return [float(p.detach().norm()) if p.is_floating_point() else 0.0 for p in parameters]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
