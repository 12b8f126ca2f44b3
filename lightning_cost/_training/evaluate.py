"""Checks of the task losses, and what the Trainer does to them on the way to gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_cost._lightning.ranks import Ranks
from lightning_cost._vectors import norm_of

__all__: list[str] = []

# Far above what rounding does, and far below what an optimizer step or a teleport changes.
_REPEATABLE = 1e-3


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


def checked_scalar(value: object) -> tuple[Tensor, float | None]:
    """What ``scalarize`` of a surface has returned: the scalar, and the common factor of the losses if there is one.

    Raises:
        TypeError: If it is something else.
    """
    total, weight = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not isinstance(total, Tensor) or total.ndim or not (weight is None or isinstance(weight, (int, float))):
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"`scalarize` must return a scalar tensor, or one with a common factor or None; got {found}.")
    return total, weight


def check_losses(losses: object, source: str = "`task_losses`") -> dict[str, Tensor | None]:
    """Check what ``task_losses`` returned.

    Args:
        losses: What it returned.
        source: What returned it, for the message.

    Returns:
        The losses by task, in at least single precision; ``None`` for a task without one.

    Raises:
        TypeError: If it is not a dictionary with strings as keys.
        ValueError: If a loss is neither a scalar tensor of floating-point numbers nor ``None``.
    """
    if not isinstance(losses, Mapping) or not all(isinstance(name, str) for name in losses):
        raise TypeError(
            f"{source} must return a dictionary with a scalar tensor per task, such as"
            f" {{'left': ..., 'right': ...}}; got {losses!r}."
        )
    checked: dict[str, Tensor | None] = {}
    for name, loss in losses.items():
        if loss is None:
            checked[name] = None
            continue
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
            raise ValueError(
                f"The loss of task {name!r} must be a scalar tensor, or None without labels; got {kind}. Reduce it"
                " first."
            )
        if not loss.is_floating_point():
            raise ValueError(
                f"The loss of task {name!r} must be a floating-point number; got {loss.dtype}. Return a real loss, such"
                " as `output.abs().mean()`."
            )
        # Half precision would not even hold the scale of a gradient scaler.
        checked[name] = loss.float() if loss.dtype.itemsize < 4 else loss
    return checked


def check_has_graph(losses: Mapping[str, Tensor], module: nn.Module) -> None:
    """Refuse a loss that nothing can be learned from, unless parameters are frozen.

    Args:
        losses: The losses.
        module: The module that they are of.

    Raises:
        ValueError: If a loss has no graph.
    """
    for name, loss in losses.items():
        # With frozen parameters, a task may have nothing to train for a while.
        if not loss.requires_grad and all(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(
                f"The loss of task {name!r} has no graph: it is a constant, or it was computed from detached tensors or"
                " under `torch.no_grad()`. Compute it from the output of the network. For a task without labels in this"
                " batch, return None."
            )


def present(losses: Mapping[str, Tensor | None], names: Iterable[str]) -> dict[str, Tensor]:
    """The losses that are there, in the order of ``names``."""
    found = {name: losses.get(name) for name in names}
    return {name: loss for name, loss in found.items() if loss is not None}


def values_of(losses: Mapping[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
    """The losses without graph, shape ``(K,)``.

    Args:
        losses: The losses by task.
        names: The tasks; ``None`` for those of ``losses``. A task without a loss has zero.
    """
    if names is None or len(losses) == len(names):
        return torch.stack([loss.detach() for loss in losses.values()])
    zero = next((torch.zeros_like(loss.detach()) for loss in losses.values()), torch.zeros(()))
    return torch.stack([losses[name].detach() if name in losses else zero for name in names])


def mean_losses(losses: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Task losses of several micro-batches, averaged over them and over the processes, shape ``(K,)``."""
    return ranks.mean_(torch.stack(list(losses)).mean(dim=0))


def repeated(before: Tensor, after: Tensor, names: Sequence[str]) -> str:
    """Whether losses came back, in words; empty if they did.

    Args:
        before: Losses, shape ``(K,)``.
        after: The same, evaluated again with the same parameters.
        names: The tasks.
    """
    was, now = before.double().cpu(), after.double().cpu()
    slack = 64 * torch.finfo(before.dtype).eps * was.abs().max()
    wrong = ~((now - was).abs() <= _REPEATABLE * was.abs() + slack)
    changes = [
        f"task {name!r} from {float(was[index]):.6g} to {float(now[index]):.6g}"
        for index, name in enumerate(names)
        if wrong[index]
    ]
    return ", ".join(changes)


def unrepeatable_message(who: str, changes: str) -> str:
    """The error for losses that did not come back.

    Args:
        who: What evaluates the losses again.
        changes: See :func:`repeated`.
    """
    return (
        f"{who} evaluates `task_losses` again on the batch of a step, but with the same parameters it returned other"
        f" losses: {changes}. It must be repeatable. Usual causes: it depends on something that each call changes (a"
        " counter, a queue, an object that is neither a buffer nor an attribute of a module, a random generator outside"
        " of the module), or it changes the batch in a way that cannot be undone. Keep such state in a buffer"
        " (`register_buffer`), or update it in `on_train_batch_end`."
    )


def grads_are_finite(parameters: Iterable[Parameter]) -> bool:
    """Whether ``.grad`` of every parameter is finite."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return math.isfinite(norm_of([grad.coalesce().values() if grad.is_sparse else grad for grad in grads]))


def check_finite(values: Mapping[str, float], what: str, is_over: bool = False) -> None:
    """Refuse figures of tasks that are NaN or infinite.

    Args:
        values: One figure per task.
        what: What the figures are, for the message.
        is_over: Whether the optimizer step has been taken.

    Raises:
        ValueError: If one is not finite.
    """
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        state = "hold the result of that step" if is_over else "are as they were before this step"
        raise ValueError(
            f"{what} of task {', '.join(map(repr, bad))} is not finite: {bad}. The parameters {state}; look at the"
            " batch, the learning rate and the numerical range of that loss."
        )
