"""Every precision of the Trainer, a gradient scaler among them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.testing import assert_close
from torchjd.aggregation import Aggregator, UPGrad

from lightning_cost.objectives import ConflictAlignment
from tests.support.nets import Batch, Net, fit, make_batches
from tests.support.teleporting import teleporter

pytestmark = pytest.mark.slow


def scaled(init_scale: float = 2.0**10, **settings: Any) -> dict[str, Any]:
    """Trainer settings for ``16-mixed`` on the CPU, which Lightning offers on GPUs only."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **settings)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


class Rows(L.Callback):
    """Keeps the task gradients of each step, and what they should be."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.found.append(pl_module.task_gradients.matrix.clone())
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize("accumulate_grad_batches", [1, 3])
@pytest.mark.parametrize("method", [None, UPGrad()])
def test_task_gradients_are_without_the_scale(method: Any, accumulate_grad_batches: int) -> None:
    def rows(**settings: Any) -> Rows:
        found = Rows()
        module = Net(method)
        callbacks = [found, teleporter(trigger=lambda gradients: False)]
        fit(module, make_batches(12), accumulate_grad_batches=accumulate_grad_batches, callbacks=callbacks, **settings)
        return found

    reference, half = rows(), rows(**scaled())
    assert len(half.found) == 12 // accumulate_grad_batches
    # Half precision rounds to 3 digits, and training goes on with what was rounded.
    for one, two in zip(half.found, reference.found, strict=True):
        assert_close(one, two, rtol=0, atol=0.01)
    for one, two in zip(half.gradients, reference.gradients, strict=True):
        assert_close(one, two, rtol=0, atol=0.01)


class Overflowing(Net):
    """The n-th batch has a loss whose gradient overflows in half precision, or which is itself infinite."""

    at = 3
    factor = 1e30

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        losses = super().task_losses(batch, batch_idx)
        if batch_idx == self.at:
            losses["left"] = losses["left"] * self.factor
        return losses


@pytest.mark.parametrize("factor", [1e30, math.inf, math.nan])
@pytest.mark.parametrize("method", [None, UPGrad()])
def test_a_scaler_skips_a_step_that_overflows_and_there_is_no_teleport(method: Any, factor: float) -> None:
    states = []

    class States(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    module, callback = Overflowing(method), teleporter()
    module.factor = factor
    settings = scaled()
    fit(module, make_batches(6), callbacks=[callback, States()], **settings)
    assert [report.step for report in callback.reports] == [0, 1, 2, 4, 5]
    assert all(torch.equal(states[3][name], states[2][name]) for name in states[2])
    assert not all(torch.equal(states[4][name], states[3][name]) for name in states[3])
    assert settings["plugins"][0].scaler.get_scale() == 2.0**9


class RowsThatCancel(Net):
    """Two tasks whose gradients overflow with opposite signs, so that their sum is finite."""

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        losses = super().task_losses(batch, batch_idx)
        if batch_idx == 1:
            shift = self.features(batch).sum() * 1e38
            losses["left"], losses["right"] = losses["left"] + shift, losses["right"] - shift
        return losses


def test_a_scaler_also_skips_a_step_where_only_a_task_overflows() -> None:
    module = RowsThatCancel(UPGrad())
    settings = scaled()
    before = []

    class States(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            before.append(pl_module.backbone[0].weight.detach().clone())

    fit(module, make_batches(3), callbacks=[States()], **settings)
    assert torch.equal(before[1], before[0])
    assert not torch.equal(before[2], before[1])
    assert settings["plugins"][0].scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("method", [None, UPGrad()])
def test_teleports_under_a_scaler_take_the_step_with_unscaled_gradients(method: Any) -> None:
    rows = Rows()
    module, callback = Net(method), teleporter(objective=ConflictAlignment(derivative="double_backward"))
    fit(module, make_batches(8), callbacks=[callback, rows], **scaled(init_scale=2.0**12))
    accepted = [report for report in callback.reports if report.accepted]
    assert len(accepted) >= 3
    for report, found in zip(callback.reports, rows.found, strict=True):
        norm = found.mean(dim=0).norm()
        assert_close(float(norm), report.grad_norm_after if report.accepted else report.grad_norm_before)
        assert float(norm) < 100


def test_a_fused_optimizer_with_a_scaler_is_refused() -> None:
    for method, callbacks in ((None, [teleporter()]), (UPGrad(), [])):
        module = Net(method)
        module.make_optimizer = partial(torch.optim.Adam, lr=1e-3, fused=True)
        with pytest.raises(MisconfigurationException, match="fused Adam divides the gradients by the loss scale"):
            fit(module, make_batches(2), callbacks=callbacks, **scaled())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true", "32-true"])
@pytest.mark.parametrize("method", [None, UPGrad()])
def test_every_precision_teleports_within_the_tolerance(precision: Any, method: Aggregator | None) -> None:
    module, callback = Net(method), teleporter()
    dtype = torch.float64 if precision == "64-true" else torch.float32
    batches = [{name: value.to(dtype) for name, value in batch.items()} for batch in make_batches(10, size=32)]
    fit(module, batches, callbacks=[callback], precision=precision)
    accepted = [report for report in callback.reports if report.accepted]
    assert len(accepted) >= 3
    assert all(report.drift <= 0.02 for report in accepted)
    assert all(min(report.cosines_after.values()) > min(report.cosines_before.values()) for report in accepted)
    expected = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {parameter.dtype for parameter in module.parameters()} == {expected}
