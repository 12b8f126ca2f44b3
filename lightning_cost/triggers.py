"""When to teleport: conditions on the task gradients, and the schedule of their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_cost._arguments import check_instance, check_integer, check_share
from lightning_cost.gradients import TaskGradients

__all__ = [
    "TRIGGERS",
    "DominatedConflict",
    "Majority",
    "Schedule",
    "Trigger",
    "any_conflict",
    "dominated_conflict",
    "weak_conflict",
]

Trigger: TypeAlias = Callable[[TaskGradients], bool]
"""Decides from the task gradients whether to teleport. It gets the tasks that have a gradient, two or more."""

TriggerName: TypeAlias = Literal["dominated", "majority", "any", "weak"]


def dominated_conflict(gradients: TaskGradients) -> bool:
    r"""Whether the task with the smallest gradient conflicts with the mean: :math:`\cos \phi_{i0} < 0` (Eq. 3).

    Example:
        >>> import torch
        >>> dominated_conflict(TaskGradients(["left", "right"], torch.tensor([[3.0, 4.0], [-1.0, 0.0]])))
        True
    """
    _check_gradients(gradients)
    conflicts = gradients.conflicts
    return conflicts[int(gradients.gramian_on_host.diagonal().argmin())]


@dataclass(frozen=True)
class DominatedConflict:
    r""":func:`dominated_conflict` (Eq. 3), checked *lazily*: at one backward pass, however many tasks there are.

    Eq. 3 asks about the task with the smallest gradient and the mean only. A check differentiates the task that is
    expected to have the smallest gradient, by its loss and by what its gradient was so far. The mean comes with the
    ordinary backward pass if the losses are not weighted, and else by one more. If the task conflicts, all tasks are
    differentiated, and they decide.

    Every conflict that it finds is one. It overlooks those of a batch in which another task has the smallest gradient,
    and which task that is changes from batch to batch. It found two thirds of the conflicts with three tasks, 60 % with
    seven, and 53 to 63 % with eleven (``python -m benchmarks.lazy``). So take it as a cheap sample of the conflicts.

    With an aggregator, which needs all task gradients in any case, and with two tasks, every check looks at all.

    Args:
        all_tasks_every: At least every so many checks look at all tasks. 1 makes every check exact.

    Example:
        >>> from lightning_cost import SymmetryTeleportCallback
        >>> callback = SymmetryTeleportCallback(trigger=DominatedConflict(all_tasks_every=50))
    """

    all_tasks_every: int = 50

    def __post_init__(self) -> None:
        check_integer("all_tasks_every", self.all_tasks_every, 1)

    def __call__(self, gradients: TaskGradients) -> bool:
        """Whether the task with the smallest gradient conflicts with the mean."""
        return dominated_conflict(gradients)


@dataclass(frozen=True)
class Majority:
    r"""Whether at least :math:`\lceil \text{share} \cdot K \rceil` tasks conflict with the mean (Eq. 4: half of them).

    Args:
        share: Share of the tasks, in (0, 1]. The paper takes 0.5. Half of the tasks can conflict only if one gradient
            is much larger than the others.

    Example:
        >>> import torch
        >>> gradients = TaskGradients(["a", "b", "c"], torch.tensor([[9.0, 0.0], [-1.0, 1.0], [0.0, 1.0]]))
        >>> Majority()(gradients), Majority(share=0.3)(gradients)
        (False, True)
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        check_share("share", self.share, 0)

    def __call__(self, gradients: TaskGradients) -> bool:
        """Whether the share is reached."""
        _check_gradients(gradients)
        # Without the guard, ceil(0.28 * 25) would be 8: the product rounds to just above 7.
        needed = max(1, math.ceil(self.share * len(gradients.names) - 1e-9))
        return sum(gradients.conflicts) >= needed


def any_conflict(gradients: TaskGradients) -> bool:
    r"""Whether any task conflicts with the mean: dominated conflict of Definition 1 for some :math:`i`."""
    _check_gradients(gradients)
    return any(gradients.conflicts)


def weak_conflict(gradients: TaskGradients) -> bool:
    r"""Whether any two tasks conflict: :math:`\cos \phi_{ij} < 0` (weak conflict, Definition 1)."""
    _check_gradients(gradients)
    return bool((gradients.pairwise_cosines < 0).any())


def _check_gradients(gradients: object) -> None:
    what = "a TaskGradients, such as `module.task_gradients`"
    check_instance("gradients", gradients, TaskGradients, what)


TRIGGERS: dict[str, Trigger] = {
    "dominated": dominated_conflict,
    "majority": Majority(),
    "any": any_conflict,
    "weak": weak_conflict,
}
"""The triggers that ``SymmetryTeleportCallback`` knows by name."""


@dataclass(frozen=True)
class Schedule:
    """When the trigger is checked: delayed start and frequency control (appendix of the paper).

    Args:
        start_epoch: First epoch with checks, counted from 0.
        max_per_epoch: Most teleports tried in an epoch, accepted or not; ``None`` for no limit.
        check_every_n_steps: Check the trigger at every n-th optimizer step.
    """

    start_epoch: int = 1
    max_per_epoch: int | None = None
    check_every_n_steps: int = 1

    def __post_init__(self) -> None:
        check_integer("start_epoch", self.start_epoch, 0)
        check_integer("check_every_n_steps", self.check_every_n_steps, 1)
        if self.max_per_epoch is not None:
            check_integer("max_per_epoch", self.max_per_epoch, 1)

    def due(self, epoch: int, step: int, tried: int) -> bool:
        """Whether to check at optimizer step ``step`` of epoch ``epoch``, with ``tried`` teleports so far in it."""
        return (
            epoch >= self.start_epoch
            and step % self.check_every_n_steps == 0
            and (self.max_per_epoch is None or tried < self.max_per_epoch)
        )
