"""The state of one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_cost._lightning.ranks import Ranks
from lightning_cost._lightning.recording import RecordedBatch
from lightning_cost._lightning.state import ModuleState
from lightning_cost._training.accumulator import Accumulator
from lightning_cost._training.evaluate import Scalarization, mean_losses, values_of
from lightning_cost._training.grads import GradMark
from lightning_cost._training.pair import TaskPair
from lightning_cost.gradients import TaskGradients

__all__: list[str] = []

Window = tuple[int, int]
"""Identifies an optimizer step in a fit: its epoch, and the index of its window of micro-batches in the epoch."""


@dataclass(frozen=True)
class PendingLosses:
    """The losses of a micro-batch between its ``training_step`` and its ``backward``.

    Attributes:
        by_task: Task losses with a graph.
        scalarization: What is differentiated for the parameters that are not shared.
        batch: The batch, if the step records its batches.
    """

    by_task: dict[str, Tensor]
    scalarization: Scalarization
    batch: RecordedBatch | None


@dataclass(eq=False)
class Step:
    """One optimizer step, over all its micro-batches. Nothing of it is kept after the optimizer has stepped.

    Attributes:
        window: Which step it is; ``None`` before its first ``training_step``.
        weights: The task weights that it reuses; ``None`` if it computes its own.
        wants_gradients: Whether its backward passes compute task gradients, even if the method needs none.
        wants_batches: Whether it records its batches.
        watches: Whether task gradients are measured, without any effect on the step.
        pending: See :class:`PendingLosses`.
        batches: The recorded batches that were differentiated.
        accumulator: Collects the task gradients; ``None`` if nobody needs them.
        wants_pair: Whether the task with the smallest gradient and the mean are enough.
        pair: Collects these two; ``None`` if all rows are collected from the start.
        graphs: Losses with a graph that was kept, in case all rows are needed after all.
        watched: Collects the task gradients of a step that only watches; ``None`` if the step needs them itself.
        method_before: What the method remembered before it aggregated these gradients.
        aggregated: Whether ``.grad`` of the shared parameters holds the aggregation.
        mark: What ``.grad`` was when the last backward pass had ended.
        has_moved: Whether a teleport has moved the parameters.
        moved: Task gradients and losses by task where it moved to; ``None`` if they were not evaluated.
        global_step: ``trainer.global_step`` when task gradients were computed.
    """

    window: Window | None = None
    weights: Mapping[str, float] | None = None
    wants_gradients: bool = False
    wants_batches: bool = False
    watches: bool = False
    pending: PendingLosses | None = None
    batches: list[RecordedBatch] = field(default_factory=list)
    accumulator: Accumulator | None = None
    wants_pair: bool = False
    pair: TaskPair | None = None
    graphs: dict[str, Tensor] | None = None
    watched: Accumulator | None = None
    method_before: ModuleState | None = None
    aggregated: bool = False
    mark: GradMark | None = None
    has_moved: bool = False
    moved: tuple[TaskGradients, dict[str, float]] | None = None
    global_step: int | None = None

    @property
    def collected(self) -> Accumulator | None:
        """What collects rows in this step."""
        return self.accumulator if self.pair is None else self.pair.accumulator

    @property
    def gradients(self) -> TaskGradients | None:
        """The task gradients of the step, those of the micro-batches so far; ``None`` if nobody needs them."""
        if self.moved is not None:
            return self.moved[0]
        if self.accumulator is None or not self.accumulator.whole:
            return None
        # Between micro-batches, or if `training_step` skipped the last one: rows of this process alone.
        return self.accumulator.gradients or self.accumulator.complete(average=False)

    def losses(self, names: Sequence[str], ranks: Ranks) -> Tensor:
        """The task losses of the recorded batches, averaged over them and over the processes, shape ``(K,)``.

        A task without a loss in a batch counts as zero there.
        """
        return mean_losses([values_of(batch.losses, names) for batch in self.batches], ranks)
