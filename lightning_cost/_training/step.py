"""The state of one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_cost._lightning.ranks import Ranks
from lightning_cost._lightning.recording import RecordedBatch
from lightning_cost._training.accumulator import Accumulator
from lightning_cost._training.method import Scalarization
from lightning_cost.gradients import TaskGradients

__all__: list[str] = []


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
    """One optimizer step, over all its micro-batches. It begins when something asks for it and ends with the step.

    Attributes:
        window: Identifies the step in the training loop, from its first batch on.
        wants_gradients: Whether its backward passes compute task gradients, even if the method needs none.
        wants_batches: Whether it records its batches.
        check_due: Whether the callback checks its trigger in this step; ``None`` before it was asked.
        pending: See :class:`PendingLosses`.
        batches: The recorded batches that were differentiated.
        accumulator: Collects the task gradients; ``None`` if nobody needs them.
        moved_gradients: Task gradients of the point that a teleport moved to; ``None`` without a teleport.
        comparison: For a method that compares losses: the batches, and their losses before the optimizer step.
        closed: Whether the optimizer step has been reached. Its task gradients can still be read.
        global_step: ``trainer.global_step`` when task gradients were computed.
    """

    window: tuple[int, int] | None = None
    wants_gradients: bool = False
    wants_batches: bool = False
    check_due: bool | None = None
    pending: PendingLosses | None = None
    batches: list[RecordedBatch] = field(default_factory=list)
    accumulator: Accumulator | None = None
    moved_gradients: TaskGradients | None = None
    comparison: tuple[list[RecordedBatch], Tensor] | None = None
    closed: bool = False
    global_step: int | None = None

    @property
    def gradients(self) -> TaskGradients | None:
        """The task gradients of the step, those of the micro-batches so far; ``None`` if nobody needs them."""
        if self.moved_gradients is not None or self.accumulator is None:
            return self.moved_gradients
        if self.accumulator.gradients is None:
            # Between micro-batches, or if `training_step` skipped the last one: rows of this process alone.
            return self.accumulator.complete(average=False)
        return self.accumulator.gradients

    def losses(self, ranks: Ranks) -> Tensor:
        """The task losses of the recorded batches, averaged over them and over the processes, shape ``(K,)``."""
        return mean_losses([batch.losses for batch in self.batches], ranks)


def mean_losses(losses: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Task losses of several micro-batches, averaged over them and over the processes, shape ``(K,)``."""
    return ranks.mean_(torch.stack(list(losses)).mean(dim=0))
