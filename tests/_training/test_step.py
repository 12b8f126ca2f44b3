"""The state of one optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_cost import TaskGradients
from lightning_cost._lightning.ranks import Ranks
from lightning_cost._lightning.recording import RecordedBatch, Scene
from lightning_cost._training.accumulator import Accumulator, ExpectedNorms
from lightning_cost._training.evaluate import Numerics, mean_losses
from lightning_cost._training.step import Step


def recorded(*losses: float) -> RecordedBatch:
    by_task = {name: torch.tensor(loss) for name, loss in zip(("left", "right"), losses, strict=True)}
    return RecordedBatch(Scene(nn.Module(), None, 0), by_task)


class Mean(Ranks):
    """Stands in for two processes, of which the other one has losses of zero."""

    def mean_(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor.div_(2)


def test_losses_are_averaged_over_the_batches_and_the_processes() -> None:
    step = Step(batches=[recorded(1.0, 4.0), recorded(3.0, 0.0)])
    assert step.losses(("left", "right"), Ranks()).tolist() == [2.0, 2.0]
    assert step.losses(("left", "right"), Mean()).tolist() == [1.0, 1.0]
    assert mean_losses([torch.tensor([1.0, 2.0])], Ranks()).tolist() == [1.0, 2.0]
    # Averaging over the processes writes into no recorded batch.
    assert [loss.item() for loss in step.batches[0].losses.values()] == [1.0, 4.0]


def test_a_step_without_task_gradients_has_none() -> None:
    assert Step().gradients is None


def accumulating(parameter: Parameter) -> Accumulator:
    """An accumulator after one micro-batch with the losses 2p and 3p."""
    accumulator = Accumulator([parameter], ExpectedNorms(), Numerics())
    losses = {"left": 2 * parameter.sum(), "right": 3 * parameter.sum()}
    total = torch.stack(list(losses.values())).sum()
    accumulator.add(losses, None, 1.0, total.backward, {name: loss.item() for name, loss in losses.items()})
    return accumulator


def test_gradients_are_those_of_the_micro_batches_so_far() -> None:
    step = Step(accumulator=accumulating(Parameter(torch.ones(1))))
    assert step.accumulator is not None
    assert step.accumulator.gradients is None
    first = step.gradients
    assert first is not None
    assert first.matrix.tolist() == [[2.0], [3.0]]
    # They are completed once.
    assert step.gradients is step.accumulator.gradients is first


def test_gradients_of_the_point_that_a_teleport_moved_to_take_precedence() -> None:
    moved = TaskGradients(["left", "right"], torch.eye(2))
    step = Step(accumulator=accumulating(Parameter(torch.ones(1))), moved=(moved, {"left": 1.0, "right": 1.0}))
    assert step.gradients is moved
