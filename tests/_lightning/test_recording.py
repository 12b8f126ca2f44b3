"""Evaluating recorded batches again leaves no trace in the module."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import CatMetric, MeanMetric

from lightning_cost._lightning.recording import preserved
from lightning_cost._lightning.state import BufferState
from tests.support.nets import Batch, Net, fit, make_batches, make_mlp
from tests.support.teleporting import assert_same, snapshot, teleporter


class Differentiating(Net):
    """Its losses differentiate the output with respect to the input, as forces are computed from an energy."""

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        x = batch["x"].clone().requires_grad_()
        features = self.backbone(x).tanh()
        (slope,) = torch.autograd.grad(features.sum(), x, create_graph=True)
        return self.losses(batch, features) | {"slope": slope.square().mean()}


def test_task_losses_may_differentiate_something_themselves() -> None:
    callback = teleporter()
    fit(Differentiating(), make_batches(4), callbacks=[callback])
    assert any(report.accepted for report in callback.reports)


class Counted(Net):
    """With everything that evaluating the losses changes: statistics, a buffer that appears, a metric, logs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(make_mlp(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), make_mlp(6, 4))
        self.register_buffer("calls", None)
        self.metric = MeanMetric()
        self.values = CatMetric()

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        losses = super().task_losses(batch, batch_idx)
        self.calls = torch.ones(1) if self.calls is None else self.calls + 1
        self.metric.update(losses["left"].detach())
        self.values.update(losses["left"].detach())
        self.log("left", losses["left"])
        self.log_dict({"right": losses["right"]})
        return losses


def everything(module: Counted) -> dict[str, Any]:
    return {
        **snapshot(module),
        "metric": dict(module.metric.metric_state),
        "values": list(module.values.metric_state["value"]),
        "updates": [module.metric.update_count, module.values.update_count],
    }


@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_leaves_buffers_metrics_random_numbers_and_logs_as_they_were(fails: bool) -> None:
    module, (batch,) = Counted(), make_batches(1)
    module.metric.update(7.0)
    module.values.update(7.0)
    before = copy.deepcopy(everything(module))
    with suppress(ArithmeticError), preserved(module):
        for _ in range(2):
            module.task_losses(batch, 0)
        assert module.calls.tolist() == [2.0]
        assert module.metric.update_count == 3
        assert not torch.equal(module.backbone[1].running_mean, torch.zeros(6))
        if fails:
            raise ArithmeticError
    assert_same({**everything(module), "identities": None}, {**before, "identities": None})
    assert module.calls is None
    assert module.metric.compute() == module.values.compute() == 7.0


def test_buffers_are_restored_in_place() -> None:
    norm = nn.BatchNorm1d(2)
    mean, state = norm.running_mean, BufferState([norm])
    norm(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    norm.running_var = torch.zeros(2)
    state.restore()
    assert norm.running_mean is mean
    assert mean.tolist() == [0.0, 0.0]
    assert norm.running_var.tolist() == [1.0, 1.0]
