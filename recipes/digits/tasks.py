"""The tasks on a pair of digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["TASKS", "Digits", "Task", "chosen_tasks"]


@dataclass(frozen=True)
class Digits:
    """The left or the right digits of the pairs: images (N, 8, 8) in [0, 1], and classes (N,) from 0 to 9."""

    images: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Task:
    """A classification or a regression.

    Attributes:
        target: Makes the targets (N,) from the left and the right digits: class indices, or values for a regression.
        num_classes: Number of classes; None for a regression.
    """

    target: Callable[[Digits, Digits], Tensor]
    num_classes: int | None

    @property
    def metric(self) -> str:
        """Its metric: `accuracy`, or `mse` for a regression."""
        return "mse" if self.num_classes is None else "accuracy"


def _ink(left: Digits, right: Digits) -> Tensor:
    # Badly scaled on purpose: the variance is about 38.
    return 2 * (left.images.sum((1, 2)) - right.images.sum((1, 2)))


TASKS: dict[str, Task] = {
    "left": Task(lambda left, right: left.classes, num_classes=10),
    "right": Task(lambda left, right: right.classes, num_classes=10),
    "ink": Task(_ink, num_classes=None),
    "sum": Task(lambda left, right: left.classes + right.classes, num_classes=19),
    "larger": Task(lambda left, right: (left.classes > right.classes).long(), num_classes=2),
    "left_odd": Task(lambda left, right: left.classes % 2, num_classes=2),
    "right_odd": Task(lambda left, right: right.classes % 2, num_classes=2),
}


def chosen_tasks(names: Sequence[str]) -> dict[str, Task]:
    """Look up tasks by name, in the given order.

    Raises:
        ValueError: If there is no name, an unknown one, or one twice.
    """
    if not names or len(set(names)) != len(names) or not set(names) <= set(TASKS):
        raise ValueError(f"tasks={names!r} must name one or more of {tuple(TASKS)}, each once.")
    return {name: TASKS[name] for name in names}
