"""The task gradients of one optimizer step, collected over its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_cost._training.autograd import no_gradient, reached_leaves, task_gradient
from lightning_cost._training.evaluate import Numerics
from lightning_cost._vectors import accumulate, assign, columns, num_elements, row_dtype
from lightning_cost.gradients import TaskGradients

__all__: list[str] = []


class ExpectedNorms:
    """Predicts which task gradient of a step is going to be the largest.

    A task's gradient is expected to be as large, relative to its loss, as it was last. If a batch weighs a task
    differently or lacks its labels, the loss shows it.

    Attributes:
        rates: Norm of a task's gradient over its absolute loss, by task, from the last step in which the loss was not
            zero.
    """

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    def learn(self, gradients: TaskGradients, losses: Sequence[float]) -> None:
        """Note the norms of task gradients, and the losses that they belong to."""
        for name, norm, loss in zip(gradients.names, gradients.norms.tolist(), losses, strict=True):
            if loss != 0:
                self.rates[name] = norm / abs(loss)

    def largest(self, names: Sequence[str], losses: Sequence[float]) -> int | None:
        """The index of the task that is expected to have the largest gradient; ``None`` if nothing is known."""
        if not self.rates.keys() >= set(names):
            return None
        norms = [self.rates[name] * abs(loss) for name, loss in zip(names, losses, strict=True)]
        largest = max(norms)
        return norms.index(largest) if 0 < largest < math.inf else None


class Accumulator:
    r"""Differentiates the tasks of one optimizer step, and adds up their gradients over its micro-batches.

    There is one row per task. Reverse mode needs a backward pass for each of them, and one more for the ordinary
    ``.grad`` of all parameters. If the scalarized loss weighs the tasks equally, ``.grad`` also holds the sum of all
    rows, so one row comes by subtraction instead of a backward pass. Subtraction rounds relative to that sum. The
    largest row is at least :math:`1/K` of it, so the row that is expected to be the largest is subtracted.

    Args:
        shared: The shared parameters.
        expected: What is known of the norms. The first step knows nothing and differentiates every task.
        numerics: What happens to losses on the way to gradients.
        spare: A matrix whose memory may be reused.

    Attributes:
        shared: The shared parameters.
        losses: Task losses of the first micro-batch.
        gradients: The completed task gradients; ``None`` before, and while more are added.
        whole: Whether every micro-batch was added in full. An exception may have ended one in between.
    """

    def __init__(
        self,
        shared: Sequence[Parameter],
        expected: ExpectedNorms,
        numerics: Numerics,
        spare: Tensor | None = None,
    ) -> None:
        self.shared = list(shared)
        self.losses: list[float] = []
        self.gradients: TaskGradients | None = None
        self.whole = False
        self._expected = expected
        self._numerics = numerics
        self._spare = spare
        self._names: tuple[str, ...] = ()
        self._matrix: Tensor | None = None
        self._subtracted: int | None = None
        self._weight = 1.0
        self._reached: set[Tensor] = set()

    def add(
        self,
        losses: Mapping[str, Tensor],
        weight: float | None,
        share: float,
        backward: Callable[[], object],
        values: Tensor,
    ) -> int:
        """Differentiate a micro-batch: add the rows of its tasks, then run its ordinary backward pass.

        Args:
            losses: Scalar task losses with a graph.
            weight: The common factor of the task losses in what ``backward`` differentiates; ``None`` if they have
                several, or if ``.grad`` is not exactly their sum.
            share: Factor of this micro-batch, one over the number of micro-batches.
            backward: Runs the ordinary backward pass, which fills ``.grad``.
            values: The losses averaged over the processes. They choose the subtracted row, which must be the same on
                all processes.

        Returns:
            The number of backward passes.

        Raises:
            RuntimeError: If the graph of a task reaches no shared parameter.
        """
        # Rows and `.grad` belong together. If `.grad` was cleared, the rows are from a step that was interrupted.
        self.gradients, self.whole = None, False
        cleared = all(parameter.grad is None for parameter in self.shared)
        first = cleared or self._matrix is None
        if first:
            # Task gradients may be requested in the middle of a window, and `.grad` of a parameter outside the
            # optimizer is never cleared. Then `.grad` holds more than these losses.
            self._begin(losses, weight if cleared else None, values)
        assert self._matrix is not None
        loss_scale, passes = self._numerics.loss_scale, 1
        for index, (name, loss) in enumerate(losses.items()):
            if index == self._subtracted:
                reached = reached_leaves(loss).intersection(self.shared)
                if not reached:
                    raise no_gradient(name)
                self._reached |= reached
                continue
            passes += 1
            gradients = task_gradient(name, loss, self.shared, share * loss_scale)
            row = self._matrix[index]
            if first:
                assign(gradients, self.shared, row)
                if loss_scale != 1:
                    row.mul_(1 / loss_scale)
            else:
                accumulate(gradients, self.shared, row, 1 / loss_scale)
        backward()
        self.whole = True
        return passes

    def complete(self, average: bool = True) -> TaskGradients:
        """Finish the rows after the last micro-batch.

        Args:
            average: Whether to average the rows over the processes. ``.grad`` must be averaged already.
        """
        assert self._matrix is not None
        subtracted, ranks, sent_dtype = self._subtracted, self._numerics.ranks, self._numerics.sent_dtype
        if average and ranks.size > 1:
            # The subtracted row comes from `.grad`. It need not be sent.
            matrix = self._matrix
            for block in (matrix,) if subtracted is None else (matrix[:subtracted], matrix[subtracted + 1 :]):
                ranks.mean_(block, sent_dtype)
            if subtracted is not None:
                flags = ranks.any_of([parameter in self._reached for parameter in self.shared])
                self._reached = {parameter for parameter, flag in zip(self.shared, flags, strict=True) if flag}
        if subtracted is not None:
            self._subtract_others(subtracted)
        self.gradients = TaskGradients(self._names, self._matrix)
        if subtracted is not None:
            dtypes = (self._matrix.dtype, self._matrix.dtype if sent_dtype is None or not average else sent_dtype)
            self._silence_rounding(subtracted, max(torch.finfo(dtype).eps for dtype in dtypes))
        return self.gradients

    def _begin(self, losses: Mapping[str, Tensor], weight: float | None, values: Tensor) -> None:
        self._names = tuple(losses)
        self.losses = values.tolist()
        shape, dtype = (len(losses), num_elements(self.shared)), row_dtype(self.shared)
        spare, device = self._spare if self._matrix is None else self._matrix, self.shared[0].device
        reusable = spare is not None and spare.shape == shape and spare.dtype == dtype and spare.device == device
        self._matrix = spare if reusable else torch.empty(shape, device=device, dtype=dtype)
        self._spare = None
        self._subtracted = None
        if weight is not None and len(losses) > 1:
            self._weight = weight
            self._subtracted = self._expected.largest(self._names, self.losses)
        self._reached = set()

    def _subtract_others(self, index: int) -> None:
        assert self._matrix is not None
        weight = self._weight * self._numerics.loss_scale
        others = [row for row in range(len(self._names)) if row != index]
        for parameter, block in zip(self.shared, columns(self._matrix, self.shared), strict=True):
            # One parameter after the other, so that most of a block stays in the cache.
            row = block[index]
            if parameter.grad is None or parameter not in self._reached:
                row.zero_()
                continue
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            torch.sub(gradient.reshape(-1), block[others[0]], alpha=weight, out=row)
            for other in others[1:]:
                row.sub_(block[other], alpha=weight)
            if weight != 1:
                row.div_(weight)

    def _silence_rounding(self, index: int, eps: float) -> None:
        """Set a row to zero that is no larger than the rounding of the subtraction: its direction is noise."""
        assert self._matrix is not None
        assert self.gradients is not None
        norms = self.gradients.norms
        if norms[index] <= 4 * len(norms) * eps * norms.max():
            self._matrix[index].zero_()
            self.gradients = TaskGradients(self._names, self._matrix)
