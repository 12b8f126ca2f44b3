"""Evaluating recorded batches again leaves no trace in the module."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.data import Data
from torchmetrics import CatMetric, MeanMetric

from lightning_cost._lightning.recording import Scene, copied, preserved, tensors_of
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


def test_the_copy_of_a_batch_has_containers_of_its_own() -> None:
    x = torch.ones(2)
    batch = {"x": x, "more": [x, {"y": x}], "pair": (x, [x]), "name": "left"}
    copy_ = copied(batch)
    assert_same(copy_, batch)
    copy_.pop("x")
    copy_["more"][1].pop("y")
    copy_["pair"][1].clear()
    assert_same(batch, {"x": x, "more": [x, {"y": x}], "pair": (x, [x]), "name": "left"})
    assert batch["more"][0] is x
    assert copied(batch, clone=True)["more"][0] is not x


def test_a_batch_that_refers_to_itself_is_copied() -> None:
    batch: dict[str, Any] = {"x": torch.ones(1)}
    batch["self"] = batch
    assert copied(batch)["x"] is batch["x"]
    assert next(tensors_of(batch)) == ("batch['x']", batch["x"])


def test_tensors_of_a_batch_have_paths() -> None:
    x = torch.ones(1)
    paths = [path for path, _ in tensors_of({"x": x, "more": [1, (x,)], "graph": Data(edge=x)})]
    assert paths == ["batch['x']", "batch['more'][1][0]", "batch['graph']['edge']"]


def test_a_tensor_that_is_changed_in_place_is_named() -> None:
    batch = {"x": torch.ones(2), "y": torch.ones(2)}
    scene = Scene(nn.Module(), batch, 0)
    assert scene.changed_tensor() is None
    batch["y"].mul_(2)
    assert scene.changed_tensor() == "batch['y']"
    other = Scene(nn.Module(), batch, 0, clone=True)
    batch["y"].mul_(2)
    assert other.changed_tensor() is None
    assert other.restore()["y"].tolist() == [2.0, 2.0]


def test_the_network_of_a_module_is_no_batch() -> None:
    net = nn.Linear(1, 1)
    assert copied(net) is net
    assert copied([print])[0] is print
    assert list(tensors_of([net, print, nn.Linear])) == []
