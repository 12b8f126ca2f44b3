"""What can be asked of a pair of digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["TASKS", "Digits", "Task", "chosen_tasks"]


@dataclass(frozen=True)
class Digits:
    """One side of the pairs.

    Attributes:
        images: (N, 8, 8), values in [0, 1].
        classes: (N,), from 0 to 9.
    """

    images: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Task:
    """One target, the number of outputs that it needs and the metric that it is judged by.

    Attributes:
        target: Left and right digits to the targets (N,): class indices, or values where `num_classes` is None.
        num_classes: Number of classes; None for a regression.
    """

    target: Callable[[Digits, Digits], Tensor]
    num_classes: int | None

    @property
    def num_outputs(self) -> int:
        """Features of the head."""
        return self.num_classes or 1

    @property
    def metric(self) -> str:
        """`accuracy`, of which more is better, or `mse`, of which less is."""
        return "mse" if self.num_classes is None else "accuracy"


def _ink(left: Digits, right: Digits) -> Tensor:
    # A variance of about 38 makes it a badly scaled task on purpose.
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
    """Look up some of the tasks, in the order given.

    Raises:
        ValueError: If there is no name, an unknown one, or one twice.
    """
    if not names or len(set(names)) != len(names) or not set(names) <= set(TASKS):
        raise ValueError(f"tasks={names!r} must name one or more of {tuple(TASKS)}, each once.")
    return {name: TASKS[name] for name in names}
