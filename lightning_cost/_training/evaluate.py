"""Checks of the task losses, and what the Trainer does to them on the way to gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_cost._lightning.ranks import Ranks
from lightning_cost._vectors import norm_of

__all__: list[str] = []


@dataclass(frozen=True)
class Numerics:
    """What happens to losses on the way to gradients.

    Attributes:
        ranks: The processes, over which gradients are averaged.
        loss_scale: The factor of a gradient scaler, which keeps half-precision gradients from vanishing. ``.grad`` has
            this factor; task gradients do not.
        sent_dtype: Type in which task gradients are sent to other processes; ``None`` for their own.
    """

    ranks: Ranks = field(default_factory=Ranks)
    loss_scale: float = 1.0
    sent_dtype: torch.dtype | None = None


class Scalarization(NamedTuple):
    """The scalar that the ordinary backward pass differentiates.

    Attributes:
        total: The scalar, with a graph.
        weight: The common factor of the task losses in it; ``None`` if they have several.
    """

    total: Tensor
    weight: float | None


def check_losses(losses: object, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Check what ``task_losses`` returned.

    Args:
        losses: What it returned.
        names: The tasks of the run, in order; ``None`` at the first call.

    Returns:
        The losses in the order of ``names``, in at least single precision.

    Raises:
        TypeError: If it is not a dictionary.
        ValueError: If a loss is not a scalar tensor, or if the tasks are others than before.
    """
    if not isinstance(losses, Mapping) or not losses:
        raise TypeError(
            "`task_losses` must return a dictionary with a scalar tensor per task, such as"
            f" {{'left': ..., 'right': ...}}; got {losses!r}."
        )
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
            raise ValueError(f"The loss of task {name!r} must be a scalar tensor; got {kind}. Reduce it first.")
    names = tuple(losses) if names is None else names
    if set(losses) != set(names):
        missing = sorted(set(names) - set(losses))
        unknown = sorted(set(losses) - set(names))
        raise ValueError(
            "`task_losses` must return the same tasks at every step."
            f" Missing now: {missing}; not there before: {unknown}. For a batch without labels of a task, return a"
            " loss of zero that is connected to the graph, such as `0 * prediction.sum()`."
        )
    # Half precision would not even hold the scale of a gradient scaler.
    return {name: losses[name].float() if losses[name].dtype.itemsize < 4 else losses[name] for name in names}


def values_of(losses: Mapping[str, Tensor]) -> Tensor:
    """The losses without graph, shape ``(K,)``."""
    return torch.stack([loss.detach() for loss in losses.values()])


def mean_losses(losses: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Task losses of several micro-batches, averaged over them and over the processes, shape ``(K,)``."""
    return ranks.mean_(torch.stack(list(losses)).mean(dim=0))


def grads_are_finite(parameters: Iterable[Parameter]) -> bool:
    """Whether ``.grad`` of every parameter is finite."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return math.isfinite(norm_of([grad.coalesce().values() if grad.is_sparse else grad for grad in grads]))


def check_finite(values: Mapping[str, float], what: str) -> None:
    """Refuse figures of tasks that are NaN or infinite.

    Args:
        values: One figure per task.
        what: What the figures are, for the message.

    Raises:
        ValueError: If one is not finite.
    """
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        raise ValueError(
            f"{what} of task {', '.join(map(repr, bad))} is not finite: {bad}. The parameters are as they were before"
            " this step; look at the batch, the learning rate and the numerical range of that loss."
        )
