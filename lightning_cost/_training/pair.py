"""One task and the sum of the others: what Eq. 3 asks about, at one more backward pass for any number of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_cost._training.accumulator import Accumulator, ExpectedNorms
from lightning_cost._training.evaluate import Numerics

__all__: list[str] = []

_OTHERS = "the other tasks"


class TaskPair:
    """The gradient of one task, and that of the sum of the others.

    Their sum is the mean gradient but for a factor, so the cosine of the task with it is the one of Definition 1. With
    the mean of the losses, the ordinary backward pass holds it already.

    Args:
        task: The task.
        shared: The shared parameters.
        numerics: What happens to losses on the way to gradients.
        spare: A matrix whose memory may be reused.

    Attributes:
        task: The task.
        accumulator: Collects the two rows.
    """

    def __init__(self, task: str, shared: Sequence[Parameter], numerics: Numerics, spare: Tensor | None) -> None:
        self.task = task
        self._numerics = numerics
        expected = ExpectedNorms()
        expected.rates = {task: 0.0, _OTHERS: 1.0}
        self.accumulator = Accumulator(shared, expected, numerics, spare, strict=False, keep_missing=True)
        self._values: dict[str, float] = {}

    def add(
        self,
        losses: Mapping[str, Tensor],
        weight: float | None,
        share: float,
        backward: Callable[[], object],
        values: Mapping[str, float],
    ) -> None:
        """Differentiate a micro-batch. See :meth:`Accumulator.add`."""
        self._values = self._values or dict(values)
        rest = [loss for name, loss in losses.items() if name != self.task]
        pair = {name: loss for name, loss in losses.items() if name == self.task}
        if rest:
            pair[_OTHERS] = torch.stack(rest).sum()
        rest_value = sum(abs(value) for name, value in values.items() if name != self.task)
        self.accumulator.add(pair, weight, share, backward, {self.task: values[self.task], _OTHERS: rest_value})

    @property
    def conflicts(self) -> bool:
        """Whether the task may conflict with the mean: all rows must then be looked at."""
        gradients = self.accumulator.gradients
        assert gradients is not None
        # The mean of the two rows has the direction of the mean of all. A task without gradient is not the one that
        # Eq. 3 asks about.
        return gradients.conflicts[0] or not float(gradients.gramian_on_host[0, 0]) > 0

    def rate(self) -> dict[str, float]:
        """The norm of the task's gradient over its loss, by task."""
        gradients, loss = self.accumulator.gradients, abs(self._values[self.task])
        assert gradients is not None
        return {self.task: float(gradients.gramian_on_host[0, 0].clamp_min(0).sqrt()) / loss} if loss > 0 else {}

    def expanded(
        self, batches: Iterable[Mapping[str, Tensor]], share: float, expected: ExpectedNorms, spare: Tensor | None
    ) -> Accumulator:
        """All rows: those that are missing by a backward pass each, but for one, which is what is left of the others.

        Args:
            batches: The losses of each micro-batch, with a graph.
            share: Factor of a micro-batch, one over their number.
            expected: What is known of the norms.
            spare: A matrix whose memory may be reused.

        Returns:
            An accumulator that is complete.
        """
        pair, names = self.accumulator.gradients, list(self._values)
        assert pair is not None
        others = {name: abs(self._values[name]) for name in names if name != self.task}
        index = expected.largest(list(others), list(others.values()))
        left = list(others)[0 if index is None else index]
        known = {self.task: pair.matrix[0], left: pair.matrix[1].clone()}
        full = Accumulator(self.accumulator.shared, ExpectedNorms(), self._numerics, spare, strict=False)
        full.complete_from(batches, share, self._values, known, left)
        return full
