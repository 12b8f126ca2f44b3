"""Teleports in training runs: they hold the losses or change nothing, and training goes on from there."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoHaConfig
from torchjd.aggregation import UPGrad
from torchjd.scalarization import UW

from lightning_cost import (
    ConflictAlignment,
    GradientNorm,
    LevelSetSearch,
    PenaltySearch,
    RandomDirection,
    Reversed,
    SampledSharpness,
    SymmetryTeleportCallback,
)
from tests.support.nets import Batch, Net, fit, make_batches
from tests.support.teleporting import NoisyNet, Spy, assert_same, final_state, never, teleporter

SEARCHES = [
    {},
    {"search": LevelSetSearch(steps=3, full_rank=True)},
    {"objective": ConflictAlignment(derivative="double_backward")},
    {"objective": "gradient_norm"},
    {"objective": "sharpness"},
    {"objective": SampledSharpness(form="difference")},
    {"objective": RandomDirection()},
    {"objective": Reversed(ConflictAlignment())},
    {"invariance": "mean"},
    {"search": PenaltySearch(steps=4, lr=1e-2)},
    {"search": PenaltySearch(LoHaConfig(r=2), steps=4, lr=1e-2), "objective": GradientNorm()},
    {"search": PenaltySearch(steps=4, lr=1e-2, gamma=10.0), "objective": "sharpness"},
]


@pytest.mark.parametrize("settings", SEARCHES, ids=repr)
@pytest.mark.parametrize("make", [Net, NoisyNet])
def test_teleport_holds_the_losses_or_changes_nothing(settings: dict[str, Any], make: Any) -> None:
    """Measured from outside of the callback."""
    before, after = Spy(), Spy()
    callback = teleporter(**settings)
    module = make(UPGrad())
    batches = make_batches(8)
    fit(module, batches, callbacks=[before, callback, after])
    assert len(callback.reports) == 8
    assert any(report.accepted for report in callback.reports)
    for step, report in enumerate(callback.reports):
        one, two = before.snapshots[step], after.snapshots[step]
        if not report.accepted:
            assert_same(two, one)
            assert report.losses_after == report.losses_before
            continue
        for kept in ("identities", "requires_grad", "buffers", "modes", "modules", "attributes", "keys", "random"):
            assert_same(two[kept], one[kept])
        moved = [name for name, value in two["parameters"].items() if not torch.equal(value, one["parameters"][name])]
        assert moved
        assert all(name.startswith("backbone.") for name in moved)
        if make is Net:
            losses = [_losses(module, snap["parameters"], batches[step]) for snap in (one, two)]
            if settings.get("invariance") == "mean":
                losses = [value.mean(dim=0, keepdim=True) for value in losses]
            drift = float(((losses[1] - losses[0]) / losses[0]).abs().max())
            assert drift <= 0.02 + 1e-5
            assert drift == pytest.approx(report.drift, abs=1e-5)


def _losses(module: Net, parameters: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    current = {name: value.detach().clone() for name, value in module.named_parameters()}
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(parameters[name])
        losses = torch.stack(list(module.losses(batch).values()))
        for name, value in module.named_parameters():
            value.copy_(current[name])
    return losses


@pytest.mark.parametrize("method", [None, UPGrad, lambda: UW(3)], ids=["LS", "UPGrad", "UW"])
@pytest.mark.parametrize("settings", [{}, {"search": "penalty"}, {"check_every_n_steps": 2}], ids=repr)
def test_a_trigger_that_never_fires_changes_no_bit(method: Any, settings: dict[str, Any]) -> None:
    states = []
    for callbacks in ([], [SymmetryTeleportCallback(trigger=never, start_epoch=0, history="paper", **settings)]):
        torch.manual_seed(3)
        module = NoisyNet(method() if method else None)
        module.make_optimizer = partial(torch.optim.Adam, lr=1e-2)
        trainer = fit(module, make_batches(6), callbacks=callbacks, max_epochs=2, gradient_clip_val=0.5)
        states.append({**final_state(module, trainer), "random": torch.get_rng_state()})
    assert_same(states[1], states[0])


@pytest.mark.parametrize("method", [None, UPGrad, lambda: UW(3)], ids=["LS", "UPGrad", "UW"])
def test_the_step_after_a_teleport_uses_the_gradients_of_the_new_point(method: Any) -> None:
    class Check(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            losses = pl_module.losses(batches[trainer.global_step])
            shared, heads = list(pl_module.backbone.parameters()), list(pl_module.heads.parameters())
            rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses.values()]
            matrix = torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])
            torch.testing.assert_close(pl_module.task_gradients.matrix, matrix, rtol=1e-4, atol=1e-5)
            values = torch.stack(list(losses.values()))
            if isinstance(pl_module.mtl_method, UPGrad):
                total = values.sum()
            else:
                total = values.mean() if pl_module.mtl_method is None else pl_module.mtl_method(values)
            expected = torch.autograd.grad(total, heads)
            torch.testing.assert_close([p.grad for p in heads], list(expected), rtol=1e-4, atol=1e-5)

    batches = make_batches(5)
    callback = teleporter()
    fit(Net(method() if method else None), batches, callbacks=[callback, Check()])
    assert any(report.accepted for report in callback.reports)


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "amsgrad": partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=1e-2),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "radam": partial(torch.optim.RAdam, lr=3e-2),
    "adamax": partial(torch.optim.Adamax, lr=1e-2),
    "momentum": partial(torch.optim.SGD, lr=2e-2, momentum=0.9),
    "sgd": partial(torch.optim.SGD, lr=0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("history", ["paper", "momentum", "keep", "reset"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_and_history_trains_on(optimizer: str, history: Any) -> None:
    module, batches = Net(UPGrad()), make_batches(4, size=4)
    module.make_optimizer = OPTIMIZERS[optimizer]
    callback = teleporter(history=history, check_every_n_steps=2)
    with torch.no_grad():
        before = torch.stack([torch.stack(list(module.losses(batch).values())) for batch in batches]).sum()
    fit(module, batches, callbacks=[callback], max_epochs=15)
    with torch.no_grad():
        after = torch.stack([torch.stack(list(module.losses(batch).values())) for batch in batches]).sum()
    assert any(report.accepted for report in callback.reports)
    assert after < 0.9 * before
