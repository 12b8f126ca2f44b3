"""What further evaluations of the losses must not leave behind, and what a fit must not take over from the last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchjd.scalarization import DWA, Scalarizer

from lightning_cost._training.engine import engine_of
from tests.support.nets import Net, fit, make_batches, make_mlp
from tests.support.teleporting import never, teleporter


def test_scalarizers_that_remember_losses_see_each_step_once() -> None:
    module = Net(DWA())
    callback = teleporter()
    fit(module, make_batches(4), callbacks=[callback])
    assert any(report.accepted for report in callback.reports)
    assert module.mtl_method._n_batches == 4


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


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[bool] = []

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        self.calls.append(self.replaying)
        return super().task_losses(batch, batch_idx)


def test_replaying_tells_further_evaluations_from_training_steps() -> None:
    module = Counting()
    fit(module, make_batches(4), callbacks=[teleporter()])
    assert module.calls.count(False) == 4
    assert module.calls.count(True) > 4


class Skipping(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) if batch_idx != 3 else None
        return None if batch_idx in (0, 2) else loss


def test_batches_that_training_skips_are_not_teleported_on() -> None:
    callback = teleporter()
    fit(Skipping(), make_batches(6), callbacks=[callback])
    assert [report.step for report in callback.reports] == [1, 4, 5]


class BuiltInSetup(Net):
    def setup(self, stage: str) -> None:
        self.backbone = make_mlp(5, 6, 4)

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Identity()


def test_layers_may_be_built_in_setup() -> None:
    callback = teleporter()
    fit(BuiltInSetup(), make_batches(2), callbacks=[callback])
    assert len(callback.reports) == 2


def test_an_interrupted_step_does_not_reach_into_the_next_fit() -> None:
    windows: list[int] = []

    def trigger(gradients: Any) -> bool:
        windows.append(len(engine_of(module).step.batches))
        if len(windows) == 2:
            raise RuntimeError("interrupted")
        return True

    module = Net()
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(module, make_batches(4), callbacks=[teleporter(trigger=trigger)])
    fit(module, make_batches(3), callbacks=[teleporter(trigger=trigger)])
    assert windows == [1] * 5


class Diary(Scalarizer):
    """Remembers its calls in whatever can be written into."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []
        self.last: dict[str, float] = {}
        self.seen: set[float] = set()
        self.total = torch.zeros(3)

    def forward(self, values: Tensor, /) -> Tensor:
        self.values.append(float(values.detach().sum()))
        self.last["call"] = self.values[-1]
        self.seen.add(self.values[-1])
        self.total += values.detach()
        return values.mean()


def test_a_teleport_leaves_no_trace_in_a_method_that_writes_into_its_attributes() -> None:
    diaries = []
    for callbacks in ([], [teleporter(trigger=never)], [teleporter()]):
        diaries.append(Diary())
        fit(Net(diaries[-1]), make_batches(4), callbacks=callbacks)
    without, untouched, teleported = diaries
    assert untouched.values == without.values
    assert len(teleported.values) == len(teleported.seen) == 4
    assert teleported.values[0] == without.values[0]
    assert teleported.last == {"call": teleported.values[-1]}
    assert float(teleported.total.sum()) == pytest.approx(sum(teleported.values), rel=1e-5)
