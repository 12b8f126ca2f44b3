"""The task gradients of one optimizer step, collected over its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_cost._training.autograd import is_checkpointed, reached_leaves, task_gradient, unreached_cause
from lightning_cost._training.evaluate import Numerics
from lightning_cost._training.grads import GradMark
from lightning_cost._vectors import accumulate, assign, columns, num_elements, row_dtype
from lightning_cost.gradients import TaskGradients

__all__: list[str] = []

# Weight of a step in the running means. 0.1 and 0.3 find more of the smallest gradients than 1.
_NEW = 0.1


class ExpectedNorms:
    """Predicts which task gradient of a step is going to be the largest, and which the smallest.

    A task's gradient is expected to be as large, relative to its loss, as it was last. If a batch weighs a task
    differently or lacks its labels, the loss shows it.

    Attributes:
        rates: Norm of a task's gradient over its absolute loss, by task, from the last step in which the loss was not
            zero.
        means: Running means of the same. From one batch to the next a rate may double.
    """

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}
        self.means: dict[str, float] = {}

    def learn(self, gradients: TaskGradients, losses: Mapping[str, float]) -> None:
        """Note the norms of task gradients, and the losses that they belong to."""
        norms = gradients.gramian_on_host.diagonal().clamp_min(0).sqrt().tolist()
        for name, norm in zip(gradients.names, norms, strict=True):
            if losses.get(name, 0.0) != 0:
                self.note(name, norm / abs(losses[name]))

    def note(self, name: str, rate: float) -> None:
        """Note the rate of a task in a step."""
        self.rates[name] = rate
        mean = self.means.get(name, rate)
        self.means[name] = mean + _NEW * (rate - mean)

    def smallest(self, losses: Mapping[str, float]) -> str | None:
        """The task that is expected to have the smallest gradient; ``None`` if too little is known.

        Args:
            losses: The losses by task. A task with a loss of zero has no gradient.
        """
        norms = {name: self.means.get(name, math.nan) * abs(loss) for name, loss in losses.items() if loss != 0}
        if len(norms) < 3 or not all(0 < norm < math.inf for norm in norms.values()):
            return None
        return min(norms, key=lambda name: norms[name])

    def largest(self, names: Sequence[str], losses: Sequence[float]) -> int | None:
        """The index of the task that is expected to have the largest gradient; ``None`` if nothing is known."""
        if not self.rates.keys() >= {name for name, loss in zip(names, losses, strict=True) if loss != 0}:
            return None
        norms = [self.rates.get(name, 0.0) * abs(loss) for name, loss in zip(names, losses, strict=True)]
        largest = max(norms)
        return norms.index(largest) if 0 < largest < math.inf else None


class Accumulator:
    r"""Differentiates the tasks of one optimizer step, and adds up their gradients over its micro-batches.

    There is one row per task. Reverse mode needs a backward pass for each of them, and one more for the ordinary
    ``.grad`` of all parameters. If the scalarized loss weighs the tasks equally, ``.grad`` also holds the sum of all
    rows, so one row comes by subtraction instead of a backward pass. Subtraction rounds relative to that sum. The
    largest row is at least :math:`1/K` of it, so the row that is expected to be the largest is subtracted.

    A task without a loss in a micro-batch adds nothing there. A task without a loss in the whole step, on any process,
    has no row.

    Args:
        shared: The shared parameters.
        expected: What is known of the norms. The first step knows nothing and differentiates every task.
        numerics: What happens to losses on the way to gradients.
        spare: A matrix whose memory may be reused.
        strict: Whether to refuse a task whose graph reaches no shared parameter. Otherwise its row is zero, unless
            reentrant activation checkpointing hides what it reaches.
        keep_missing: Whether a task without a loss in the whole step has a row of zeros instead of none.

    Attributes:
        shared: The shared parameters.
        losses: Losses of all tasks in the first micro-batch, zero without one.
        gradients: The completed task gradients; ``None`` before, and while more are added.
        whole: Whether every micro-batch was added in full. An exception may have ended one in between.
    """

    def __init__(
        self,
        shared: Sequence[Parameter],
        expected: ExpectedNorms,
        numerics: Numerics,
        spare: Tensor | None = None,
        strict: bool = True,
        keep_missing: bool = False,
    ) -> None:
        self.shared = list(shared)
        self.losses: dict[str, float] = {}
        self.gradients: TaskGradients | None = None
        self.whole = False
        self._expected = expected
        self._numerics = numerics
        self._spare = spare
        self._strict = strict
        self._keep_missing = keep_missing
        self._names: tuple[str, ...] = ()
        self._matrix: Tensor | None = None
        self._filled: set[str] = set()
        self._subtracted: str | None = None
        self._weight = 1.0
        self._reached: set[Tensor] = set()
        self._left: GradMark | None = None

    @property
    def edited(self) -> bool:
        """Whether somebody changed ``.grad`` since the last micro-batch, so that no row can be subtracted from it."""
        return self._left is not None and self._left.edited() is not None

    def add(
        self,
        losses: Mapping[str, Tensor],
        weight: float | None,
        share: float,
        backward: Callable[[], object],
        values: Mapping[str, float],
    ) -> int:
        """Differentiate a micro-batch: add the rows of its tasks, then run its ordinary backward pass.

        Args:
            losses: Scalar task losses with a graph. A task without a loss is left out.
            weight: The common factor of the task losses in what ``backward`` differentiates; ``None`` if they have
                several, or if ``.grad`` is not exactly their sum.
            share: Factor of this micro-batch, one over the number of micro-batches.
            backward: Runs the ordinary backward pass, which fills ``.grad``.
            values: The losses of all tasks, averaged over the processes; zero without one. They choose the subtracted
                row, which must be the same on all processes.

        Returns:
            The number of backward passes.

        Raises:
            RuntimeError: If the graph of a task reaches no shared parameter.
        """
        # Rows and `.grad` belong together. If `.grad` was cleared, the rows are from a step that was interrupted.
        self.gradients, self.whole, self._left = None, False, None
        cleared = all(parameter.grad is None for parameter in self.shared)
        if cleared or self._matrix is None:
            # Task gradients may be requested in the middle of a window, and `.grad` of a parameter outside the
            # optimizer is never cleared. Then `.grad` holds more than these losses.
            self._begin(values, weight if cleared else None)
        elif len(values) > len(self._names):
            self._grow(values)
        if weight != self._weight:
            self._subtracted = None
        assert self._matrix is not None
        loss_scale, passes = self._numerics.loss_scale, 1
        for name, loss in losses.items():
            if name == self._subtracted:
                reached = reached_leaves(loss).intersection(self.shared)
                self._check_reach(name, loss, bool(reached))
                self._reached |= reached
                self._filled.add(name)
                continue
            passes += 1
            gradients = task_gradient(loss, self.shared, share * loss_scale)
            self._check_reach(name, loss, any(gradient is not None for gradient in gradients))
            row = self._matrix[self._names.index(name)]
            if name not in self._filled:
                self._filled.add(name)
                assign(gradients, self.shared, row)
                if loss_scale != 1:
                    row.mul_(1 / loss_scale)
            else:
                accumulate(gradients, self.shared, row, 1 / loss_scale)
        backward()
        self.whole = True
        return passes

    def settle(self) -> None:
        """Complete the subtracted row between micro-batches, while ``.grad`` is what the backward pass left."""
        if self._subtracted is not None:
            self._subtract_others(self._subtracted)
            self._left = GradMark(self.shared)

    def stop_subtracting(self) -> None:
        """Differentiate every task from now on. The subtracted row must be settled."""
        self._subtracted = None

    def complete(self, average: bool = True) -> TaskGradients | None:
        """Finish the rows after the last micro-batch.

        Args:
            average: Whether to average the rows over the processes. ``.grad`` must be averaged already.

        Returns:
            The task gradients; ``None`` if no task had a loss.
        """
        self._fill(average)
        if self._subtracted is not None:
            self._subtract_others(self._subtracted)
        return self._finish(self._subtracted, average)

    def complete_from(
        self,
        batches: Iterable[Mapping[str, Tensor]],
        share: float,
        values: Mapping[str, float],
        known: Mapping[str, Tensor],
        left: str,
    ) -> None:
        """Complete the rows of a step whose ``.grad`` is there already.

        Args:
            batches: The losses of each micro-batch, with a graph.
            share: Factor of a micro-batch.
            values: The losses of all tasks in the first micro-batch.
            known: Rows that are known. Averaged already, if there are several processes.
            left: The task whose known row is the sum of all other rows but the other known ones.
        """
        self._begin(values, None)
        for losses in batches:
            missing = {name: loss for name, loss in losses.items() if name not in known}
            self.add(missing, None, share, lambda: None, values)
        self._fill(average=True)
        assert self._matrix is not None
        rows = dict(zip(self._names, self._matrix, strict=True))
        for name, row in known.items():
            rows[name].copy_(row)
        for name in self._filled:
            rows[left].sub_(rows[name])
        self._filled |= known.keys()
        self._finish(left, average=True)

    def _fill(self, average: bool) -> None:
        """Set the rows of missing tasks to zero, and average the others over the processes."""
        assert self._matrix is not None
        for name, row in zip(self._names, self._matrix, strict=True):
            if name not in self._filled:
                row.zero_()
        if average and self._numerics.ranks.size > 1:
            filled = self._average([name in self._filled for name in self._names], self._numerics.sent_dtype)
            self._filled = {name for name, flag in zip(self._names, filled, strict=True) if flag}

    def _finish(self, left: str | None, average: bool) -> TaskGradients | None:
        """Make the task gradients of the rows, of which one may be what others have left of a sum."""
        assert self._matrix is not None
        self.gradients = TaskGradients(self._names, self._matrix)
        if left is not None:
            sent = self._numerics.sent_dtype if average else None
            dtypes = (self._matrix.dtype, self._matrix.dtype if sent is None else sent)
            self._silence_rounding(left, max(torch.finfo(dtype).eps for dtype in dtypes))
        if not self._keep_missing:
            names = [name for name in self._names if name in self._filled]
            self.gradients = self.gradients.select(names) if names else None
        return self.gradients

    def _begin(self, values: Mapping[str, float], weight: float | None) -> None:
        self._names = tuple(values)
        self.losses = dict(values)
        shape, dtype = (len(values), num_elements(self.shared)), row_dtype(self.shared)
        spare, device = self._spare if self._matrix is None else self._matrix, self.shared[0].device
        reusable = spare is not None and spare.shape == shape and spare.dtype == dtype and spare.device == device
        self._matrix = spare if reusable else torch.empty(shape, device=device, dtype=dtype)
        self._spare = self._subtracted = None
        if weight is not None and len(values) > 1:
            self._weight = weight
            largest = self._expected.largest(self._names, list(values.values()))
            self._subtracted = None if largest is None else self._names[largest]
        self._reached, self._filled = set(), set()

    def _grow(self, values: Mapping[str, float]) -> None:
        """Make room for tasks that appear for the first time."""
        assert self._matrix is not None
        more = self._matrix.new_zeros(len(values) - len(self._names), self._matrix.shape[1])
        self._matrix = torch.cat([self._matrix, more])
        self._names = tuple(values)
        self.losses = {name: self.losses.get(name, 0.0) for name in values}

    def _average(self, filled: list[bool], sent_dtype: torch.dtype | None) -> list[bool]:
        """Average the rows over the processes, but for the subtracted one, which comes from ``.grad``.

        Returns:
            Which rows are filled on at least one process.
        """
        assert self._matrix is not None
        ranks, matrix, blocks = self._numerics.ranks, self._matrix, [self._matrix]
        if self._subtracted is not None:
            index = self._names.index(self._subtracted)
            blocks = [matrix[:index], matrix[index + 1 :]]
        for block in blocks:
            ranks.mean_(block, sent_dtype)
        flags = ranks.any_of([*filled, *(parameter in self._reached for parameter in self.shared)])
        reached = flags[len(filled) :]
        self._reached = {parameter for parameter, flag in zip(self.shared, reached, strict=True) if flag}
        return flags[: len(filled)]

    def _subtract_others(self, name: str) -> None:
        assert self._matrix is not None
        index, weight = self._names.index(name), self._weight * self._numerics.loss_scale
        others = [row for row, other in enumerate(self._names) if other != name and other in self._filled]
        for parameter, block in zip(self.shared, columns(self._matrix, self.shared), strict=True):
            # One parameter after the other, so that most of a block stays in the cache.
            row = block[index]
            if parameter.grad is None or parameter not in self._reached:
                row.zero_()
                continue
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            if others:
                torch.sub(gradient.reshape(-1), block[others[0]], alpha=weight, out=row)
            else:
                row.copy_(gradient.reshape(-1))
            for other in others[1:]:
                row.sub_(block[other], alpha=weight)
            if weight != 1:
                row.div_(weight)

    def _silence_rounding(self, name: str, eps: float) -> None:
        """Set a row to zero that is no larger than the rounding of the subtraction: its direction is noise."""
        assert self._matrix is not None
        assert self.gradients is not None
        norms = self.gradients.gramian_on_host.diagonal().clamp_min(0).sqrt()
        index = self._names.index(name)
        if norms[index] <= 4 * len(norms) * eps * norms.max():
            self._matrix[index].zero_()
            self.gradients = TaskGradients(self._names, self._matrix)

    def _check_reach(self, name: str, loss: Tensor, reached: bool) -> None:
        if reached or not all(parameter.requires_grad for parameter in self.shared):
            return
        if not self._strict and not is_checkpointed(loss):
            return
        raise RuntimeError(
            f"The graph of the loss of task {name!r} reaches no shared parameter. {unreached_cause(loss)}"
        )
