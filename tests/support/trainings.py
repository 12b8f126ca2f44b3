"""Training runs with the mixin and with teleports, and what of two of them is compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchjd.aggregation import UPGrad

from tests.support.nets import Batch, Net, fit, make_batches, make_mlp, values_of
from tests.support.teleporting import teleporter


class Validated(Net):
    """With BatchNorm, whose modes validation switches, and a validation loader."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.backbone = nn.Sequential(make_mlp(5, 6), nn.BatchNorm1d(6), nn.Tanh(), make_mlp(6, 4))

    def val_dataloader(self) -> Any:
        return DataLoader(make_batches(2, seed=1), batch_size=None)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", sum(self.losses(batch).values()))


class Built(Validated):
    """Has no layer before the Trainer asks for them."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.backbone, self.heads = None, None

    def configure_model(self) -> None:
        if self.backbone is None:
            built = Validated()
            self.backbone, self.heads = built.backbone, built.heads


class Trajectory(L.Callback):
    """The parameters after each optimizer step, and at the start of each epoch."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.epochs: list[Tensor] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.epochs.append(values_of(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(values_of(pl_module))


class Training:
    """A way to train: with or without teleports at every step."""

    def __init__(self, method: Callable[[], Any], teleports: bool) -> None:
        self.method, self.teleports = method, teleports

    def run(
        self,
        make: Callable[[Any], L.LightningModule] = Validated,
        before: Any = (),
        after: Any = (),
        count: int = 5,
        idle: int = 0,
        **settings: Any,
    ) -> tuple[Any, Trajectory]:
        """Train on ready-made batches, without validation unless told otherwise; ``idle`` steps have no batch."""
        trajectory, teleport = Trajectory(), teleporter()
        module = make(self.method())
        callbacks = [*before, *([teleport] if self.teleports else []), *after, trajectory]
        settings = {"limit_val_batches": 0, "num_sanity_val_steps": 0, **settings}
        trainer = fit(module, make_batches(count), callbacks=callbacks, **settings)
        if self.teleports:
            assert len(teleport.reports) == trainer.global_step - idle
            assert any(report.accepted for report in teleport.reports)
        return module, trajectory


TRAININGS = {
    "teleports": Training(lambda: None, teleports=True),
    "UPGrad": Training(UPGrad, teleports=False),
    "UPGrad and teleports": Training(UPGrad, teleports=True),
}


trainings = pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)


@cache
def reference_run(training: Training, **settings: Any) -> tuple[Any, Trajectory]:
    """A run that several tests compare theirs with."""
    return training.run(**settings)


def assert_equal_runs(one: Any, two: Any) -> None:
    (module, trajectory), (other, expected) = one, two
    assert len(trajectory.steps) == len(expected.steps) > 0
    for step, wanted in zip(trajectory.steps, expected.steps, strict=True):
        assert torch.equal(step, wanted)
    state, wanted_state = module.state_dict(), other.state_dict()
    assert list(state) == list(wanted_state)
    assert all(torch.equal(state[key], wanted_state[key]) for key in state)
