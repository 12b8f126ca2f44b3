"""The gradient of one task, and tasks that have none."""

from __future__ import annotations

import pytest
from torchjd.aggregation import Mean, Sum

from tests.support.nets import Net, fit, make_batches
from tests.support.task_rows import BackboneNet, Checkpointed


@pytest.mark.parametrize("detach_from", [0, 3])
def test_a_task_without_gradient_is_named(detach_from):
    class Detached(Net):
        def task_losses(self, batch, batch_idx):
            features = self.features(batch)
            if batch_idx >= detach_from:
                features = features.detach()
            return self.losses(batch) | {"right": self.losses(batch, features)["right"]}

    with pytest.raises(RuntimeError, match="loss of task 'right' has no gradient with respect to the shared"):
        fit(Detached(Mean()), make_batches(6))


def test_a_constant_loss_is_named_in_a_step_that_would_derive_its_row():
    class Constants(Net):
        def task_losses(self, batch, batch_idx):
            losses = self.losses(batch)
            return losses | {"left": losses["left"].detach()} if batch_idx == 2 else losses

    with pytest.raises(RuntimeError, match="loss of task 'left' has no gradient"):
        fit(Constants(Sum(), scales=[100.0, 1.0, 1.0]), make_batches(6))


def test_reentrant_checkpointing_is_named_as_a_cause():
    module = BackboneNet(Checkpointed(use_reentrant=True))
    batches = [batch | {"x": batch["x"].requires_grad_()} for batch in make_batches(2)]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        fit(module, batches)
