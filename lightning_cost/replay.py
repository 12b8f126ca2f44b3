"""Evaluating training batches again without a trace: same random numbers, same statistics, no logging."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_cost.rng import RngState, preserved_rng

if TYPE_CHECKING:
    from lightning_cost.mixin import MultiTaskMixin, TaskLosses

__all__: list[str] = []

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class RecordedBatch:
    """A batch as ``task_losses`` saw it, with the random state just before.

    The batch is kept by reference: in-place changes that ``task_losses`` makes to it are seen again.

    Attributes:
        batch: The batch.
        batch_idx: Its index in the epoch.
        rng: The state of the random number generators just before.
        losses: The task losses, shape ``(K,)``.
    """

    batch: Any
    batch_idx: int
    rng: RngState
    losses: Tensor

    def replay(self, module: MultiTaskMixin) -> TaskLosses:
        """Evaluate the task losses as the training step does, with the random numbers that it drew."""
        self.rng.restore()
        with module.trainer.precision_plugin.train_step_context():
            return module.evaluate_tasks(self.batch, self.batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """Everything on the CPU, in types that ``torch.load(weights_only=True)`` reads if those of the batch are."""
        return {
            "batch": move_data_to_device(self.batch, torch.device("cpu")),
            "batch_idx": self.batch_idx,
            "rng": self.rng.state_dict(),
            "losses": self.losses.cpu(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> RecordedBatch:
        """The inverse of :meth:`state_dict`, on ``device``."""
        return cls(
            move_data_to_device(state["batch"], device),
            state["batch_idx"],
            RngState.from_state_dict(state["rng"]),
            state["losses"].to(device),
        )


@contextmanager
def without_trace(module: LightningModule) -> Iterator[None]:
    """Undo, on exit, everything that evaluating training batches does to a module besides its gradients.

    Buffers (running statistics), the states of torchmetrics metrics, what the multi-task method remembers and the
    global random generators are restored, and ``self.log`` is silent meanwhile. Training modes stay as they are: batch
    statistics and dropout belong to the losses that the optimizer sees.
    """
    metrics = [(metric, _metric_state(metric)) for metric in module.modules() if isinstance(metric, Metric)]
    buffers, remembered = _Buffers(module.modules()), Remembered(module)
    with preserved_rng(), _silent_logging(module):
        try:
            yield
        finally:
            buffers.restore()
            remembered.restore()
            for metric, state in metrics:
                metric.__dict__.update(state)


class Remembered:
    """What the multi-task method of a module and its parts remember now, in attributes and buffers.

    Args:
        module: The module.
    """

    def __init__(self, module: LightningModule) -> None:
        method = getattr(module, "mtl_method", None)
        parts = list(method.modules()) if isinstance(method, nn.Module) else []
        self._attributes = [(part, dict(vars(part))) for part in parts]
        self._buffers = _Buffers(parts)
        owned = [value for part in parts for name, value in vars(part).items() if name not in _OF_EVERY_MODULE]
        self._tensors = [(value, value.detach().clone()) for value in owned if isinstance(value, Tensor)]
        self._containers = [(value, copy.copy(value)) for value in owned if isinstance(value, (list, dict, set))]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what calls since then did to it."""
        self._buffers.restore()
        for part, attributes in self._attributes:
            vars(part).clear()
            vars(part).update(attributes)
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for container, content in self._containers:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)


class _Buffers:
    """The buffers of some modules, those that do not exist yet among them, and their values."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._buffers = [(owner, *item) for owner in modules for item in owner._buffers.items()]
        self._values = [None if buffer is None else buffer.detach().clone() for _, _, buffer in self._buffers]

    @torch.no_grad()
    def restore(self) -> None:
        for (owner, name, buffer), value in zip(self._buffers, self._values, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
            owner._buffers[name] = buffer


def _metric_state(metric: Metric) -> dict[str, Any]:
    def copy(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        return list(value) if isinstance(value, list) else value.clone()

    state: dict[str, Any] = {name: copy(value) for name, value in metric.metric_state.items()}
    return {**state, "_update_count": metric._update_count, "_computed": metric._computed}


@contextmanager
def _silent_logging(module: nn.Module) -> Iterator[None]:
    def ignore(*args: Any, **kwargs: Any) -> None:
        return None

    names = [name for name in ("log", "log_dict") if name not in module.__dict__]
    try:
        object.__setattr__(module, "_replaying", True)
        for name in names:
            object.__setattr__(module, name, ignore)
        yield
    finally:
        object.__setattr__(module, "_replaying", False)
        for name in names:
            module.__dict__.pop(name, None)
