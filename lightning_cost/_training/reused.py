"""Optimizer steps that reuse the task weights of an earlier one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

__all__: list[str] = []


def weighted_total(
    losses: Mapping[str, Tensor], weights: Mapping[str, float], others: Sequence[Parameter], scale: float
) -> Tensor:
    """A scalar with the value of the summed losses, whose gradient weighs the tasks for the shared parameters only.

    All other parameters get the gradient of the summed losses. It takes a backward pass through what is behind the
    shared parameters, and no pass for each task.

    Args:
        losses: The losses by task.
        weights: Their weights.
        others: All parameters that are not shared.
        scale: The factor of a gradient scaler.
    """
    values = torch.stack(list(losses.values()))
    factors = values.new_tensor([weights[name] for name in losses])
    total = (values * factors).sum()
    missing = (values * (1 - factors)).sum()
    if others and missing.requires_grad:
        outer = torch.full_like(missing, scale)
        gradients = torch.autograd.grad(missing, others, outer, retain_graph=True, allow_unused=True)
        pairs = [(p, g) for p, g in zip(others, gradients, strict=True) if g is not None]
        terms = [(p * (g.to_dense() if g.is_sparse else g).div(scale)).sum().to(total.dtype) for p, g in pairs]
        total = total + torch.stack(terms).sum() if terms else total
    return total - total.detach() + values.detach().sum()


class TaskWeights:
    """The task weights of an aggregator, for the steps that reuse them.

    Attributes:
        by_task: The last weight of each task.
        age: Number of optimizer steps since the weights were computed.
    """

    def __init__(self) -> None:
        self.by_task: dict[str, float] = {}
        self.age = 0

    def renew(self, names: Sequence[str], weights: Tensor) -> None:
        """Note new weights. A task that is left out keeps its last one."""
        self.by_task = {**self.by_task, **dict(zip(names, weights.tolist(), strict=True))}
        self.age = 0

    def for_step(self, names: Sequence[str], every: int) -> dict[str, float] | None:
        """The weights for the coming step; ``None`` if it must compute them.

        Args:
            names: All tasks.
            every: For how many steps weights hold.
        """
        if not names or self.age >= every - 1 or not self.by_task.keys() >= set(names):
            return None
        return self.by_task

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint needs."""
        return {"by_task": dict(self.by_task), "age": self.age}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Load :meth:`state_dict`."""
        self.by_task = dict(state.get("by_task", {}))  # type: ignore[call-overload]
        self.age = int(state.get("age", 0))  # type: ignore[call-overload]
