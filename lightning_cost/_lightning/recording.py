"""Recorded batches, and evaluating them again without leaving a trace in the module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_cost._lightning.rng import RngState, preserved_rng

__all__: list[str] = []


@dataclass(frozen=True)
class RecordedBatch:
    """A batch that ``task_losses`` has seen.

    The batch is kept by reference. If ``task_losses`` changes it in place, the next evaluation sees the change.

    Attributes:
        batch: The batch.
        batch_idx: Its index in the epoch.
        rng: The random states right before ``task_losses`` ran.
        losses: The task losses, shape ``(K,)``.
    """

    batch: Any
    batch_idx: int
    rng: RngState
    losses: Tensor


class BufferState:
    """The values of the buffers of some modules, including buffers that are ``None``.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._buffers = [(owner, *item) for owner in modules for item in owner._buffers.items()]
        self._values = [None if buffer is None else buffer.detach().clone() for _, _, buffer in self._buffers]

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers to what they were."""
        for (owner, name, buffer), value in zip(self._buffers, self._values, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
            owner._buffers[name] = buffer


@contextmanager
def preserved(module: LightningModule) -> Iterator[None]:
    """Undo on exit what evaluating training batches does to a module, gradients aside.

    Buffers (such as running statistics), the states of torchmetrics metrics and the global random generators are
    restored. ``self.log`` and ``self.log_dict`` do nothing meanwhile. Training modes stay as they are, because batch
    statistics and dropout belong to the losses that the optimizer sees.
    """
    metrics = [(metric, _metric_state(metric)) for metric in module.modules() if isinstance(metric, Metric)]
    buffers = BufferState(module.modules())
    with preserved_rng(), _silent_logging(module):
        try:
            yield
        finally:
            buffers.restore()
            for metric, state in metrics:
                metric.__dict__.update(state)


def _metric_state(metric: Metric) -> dict[str, Any]:
    def copy(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        return list(value) if isinstance(value, list) else value.clone()

    state: dict[str, Any] = {name: copy(value) for name, value in metric.metric_state.items()}
    return {**state, "_update_count": metric._update_count, "_computed": metric._computed}


@contextmanager
def _silent_logging(module: LightningModule) -> Iterator[None]:
    def ignore(*args: Any, **kwargs: Any) -> None:
        return None

    names = [name for name in ("log", "log_dict") if name not in module.__dict__]
    try:
        for name in names:
            object.__setattr__(module, name, ignore)
        yield
    finally:
        for name in names:
            module.__dict__.pop(name, None)
