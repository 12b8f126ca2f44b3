"""The gradient of one task, and tasks that have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torchjd.aggregation import Mean, Sum

from lightning_cost._training.autograd import reached_leaves, task_gradient
from tests.support.nets import Net, fit, make_batches
from tests.support.task_rows import BackboneNet, Checkpointed


@pytest.mark.parametrize("detach_from", [0, 3])
def test_a_task_without_gradient_is_named(detach_from: int) -> None:
    class Detached(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            features = self.features(batch)
            if batch_idx >= detach_from:
                features = features.detach()
            return self.losses(batch) | {"right": self.losses(batch, features)["right"]}

    with pytest.raises(RuntimeError, match="loss of task 'right' reaches no shared parameter"):
        fit(Detached(Mean()), make_batches(6))


def test_a_constant_loss_is_named_also_if_its_row_comes_by_subtraction() -> None:
    class Constants(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            losses = self.losses(batch)
            return losses | {"left": losses["left"].detach()} if batch_idx == 2 else losses

    with pytest.raises(ValueError, match="loss of task 'left' has no graph: it is a constant"):
        fit(Constants(Sum(), scales=[100.0, 1.0, 1.0]), make_batches(6))


def test_reentrant_checkpointing_is_named_as_a_cause() -> None:
    module = BackboneNet(Checkpointed(use_reentrant=True))
    batches = [batch | {"x": batch["x"].requires_grad_()} for batch in make_batches(2)]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        fit(module, batches)


def test_a_task_gradient_has_nothing_for_a_parameter_that_its_graph_does_not_reach() -> None:
    used, unused = Parameter(torch.tensor([2.0, 3.0])), Parameter(torch.ones(1))
    loss = used.square().sum()
    for scale in (1.0, 0.5):
        first, second = task_gradient(loss, [used, unused], scale)
        assert first is not None
        assert first.tolist() == [4.0 * scale, 6.0 * scale]
        assert second is None
    (first,) = task_gradient(loss, [used], create_graph=True)
    assert first is not None
    assert first.requires_grad
    for constant in (loss.detach(), unused.sum()):
        assert task_gradient(constant, [used]) == (None,)


def test_reached_leaves_are_the_parameters_in_the_graph_of_a_loss() -> None:
    one, two, three = (Parameter(torch.ones(2)) for _ in range(3))
    loss = (one * two.detach()).sum() + (three * one).sum()
    assert reached_leaves(loss) == {one, three}
    assert reached_leaves(one) == {one}
    assert reached_leaves(loss.detach()) == set()
