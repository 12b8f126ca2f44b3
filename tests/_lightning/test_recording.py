"""Evaluating recorded batches again leaves no trace in the module."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.nets import Net, fit, make_batches
from tests.support.teleporting import teleporter


class Differentiating(Net):
    """Its losses differentiate the output with respect to the input, as forces are had from an energy."""

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        x = batch["x"].clone().requires_grad_()
        features = self.backbone(x).tanh()
        (slope,) = torch.autograd.grad(features.sum(), x, create_graph=True)
        return self.losses(batch, features) | {"slope": slope.square().mean()}


def test_losses_may_differentiate_something_themselves() -> None:
    callback = teleporter()
    fit(Differentiating(), make_batches(4), callbacks=[callback])
    assert any(report.accepted for report in callback.reports)
