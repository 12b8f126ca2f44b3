"""What a module gets from the mixin: logs, checkpoints, copies, and hooks of its other base classes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchjd import scalarization
from torchjd.aggregation import UPGrad

from lightning_cost import MultiTaskMixin
from tests.support.nets import Batch, Net, PlainNet, assert_moved, assert_same_parameters, fit, make_batches, make_mlp
from tests.support.teleporting import teleporter


def test_task_losses_and_their_scalarization_are_logged() -> None:
    module, seen = Net(UPGrad(), scales=(1.0, 2.0, 3.0)), []
    module.on_train_batch_end = lambda *args: seen.append(dict(module.trainer.callback_metrics))
    with torch.no_grad():
        first = module.losses(make_batches(1)[0])
    fit(module, make_batches(2))
    assert set(seen[0]) == {"train/left_loss", "train/right_loss", "train/ink_loss", "train/loss"}
    for task, loss in first.items():
        assert seen[0][f"train/{task}_loss"].item() == pytest.approx(loss.item())
    assert seen[0]["train/loss"].item() == pytest.approx(sum(first.values()).item())


class Started(L.Callback):
    batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches += 1


def test_task_losses_must_be_written() -> None:
    class Forgetful(MultiTaskMixin, PlainNet):
        pass

    message = r"Forgetful must implement `task_losses\(self, batch, batch_idx\)`"
    started = Started()
    with pytest.raises(MisconfigurationException, match=message):
        fit(Forgetful(), make_batches(1), callbacks=[started])
    assert not started.batches
    with pytest.raises(NotImplementedError, match=message):
        Forgetful().task_losses(make_batches(1)[0], 0)


class WithLosses(PlainNet):
    """A module of a user that has task losses already, and knows nothing of the mixin."""

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        return self.losses(batch)


def test_task_losses_of_a_later_base_class_are_used() -> None:
    class Mixed(MultiTaskMixin, WithLosses):
        pass

    mixed, net = Mixed(), Net()
    mixed.mtl_method, net.mtl_method = UPGrad(), UPGrad()
    for module in (mixed, net):
        fit(module, make_batches(4), callbacks=[teleporter()])
    torch.testing.assert_close(mixed.state_dict(), net.state_dict(), rtol=0, atol=0)


def test_task_losses_may_be_an_attribute() -> None:
    class Mixed(MultiTaskMixin, PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.task_losses = lambda batch, batch_idx: self.losses(batch)

    mixed, net = Mixed(), Net()
    for module in (mixed, net):
        fit(module, make_batches(4))
    torch.testing.assert_close(mixed.state_dict(), net.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", [None, UPGrad()])
def test_checkpoints_have_the_keys_of_plain_lightning(method: Any, tmp_path: Path) -> None:
    states = []
    for net in (Net(method), PlainNet()):
        callback = ModelCheckpoint(tmp_path / type(net).__name__)
        fit(net, make_batches(3), enable_checkpointing=True, callbacks=[callback])
        states.append(torch.load(callback.best_model_path, weights_only=True)["state_dict"])
    assert list(states[0]) == list(states[1])
    PlainNet().load_state_dict(states[0], strict=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("method", [None, UPGrad(), scalarization.UW(3)])
@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_goes_on_as_the_original(duplicate: Any, method: Any, trained: bool) -> None:
    original = Net(copy.deepcopy(method))
    if trained:
        fit(original, make_batches(3))
    other = duplicate(original)
    assert_same_parameters(other, original)
    untouched = duplicate(original)
    fit(other, make_batches(3, seed=1))
    assert_same_parameters(original, untouched)
    fit(original, make_batches(3, seed=1))
    assert_same_parameters(other, original)
    assert_moved(other)


class CopyInHooks(L.Callback):
    """Copies the module wherever callbacks that average weights do."""

    def __init__(self) -> None:
        self.copies = []

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.copies.append(copy.deepcopy(pl_module))

    on_before_optimizer_step = on_before_zero_grad

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.copies.append(copy.deepcopy(pl_module))


def test_the_module_can_be_copied_during_a_step() -> None:
    callback = CopyInHooks()
    fit(Net(UPGrad()), make_batches(2), callbacks=[callback])
    assert len(callback.copies) == 6


class Base(PlainNet):
    """A base class with hooks of its own, which the mixin must not hide."""

    called: list[str]

    def on_fit_start(self) -> None:
        self.called = ["on_fit_start"]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.called.append("on_before_optimizer_step")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.called.append("on_save_checkpoint")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.called.append("on_load_checkpoint")

    def teardown(self, stage: str) -> None:
        self.called.append("teardown")


class Mixed(MultiTaskMixin, Base):
    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        return self.losses(batch)


def test_hooks_of_a_base_class_are_called() -> None:
    module = Mixed()
    trainer = fit(module, make_batches(1))
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    assert module.called == [
        "on_fit_start",
        "on_before_optimizer_step",
        "teardown",
        "on_save_checkpoint",
        "on_load_checkpoint",
    ]
    assert trainer.global_step == 1


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


@pytest.mark.parametrize("where", ["class", "instance"])
def test_task_losses_that_cannot_be_called_are_refused_at_the_start(where: str) -> None:
    class Empty(MultiTaskMixin, PlainNet):
        if where == "class":
            task_losses = None  # type: ignore[assignment]

    module = Empty()
    if where == "instance":
        module.task_losses = None  # type: ignore[method-assign, assignment]
    with pytest.raises(MisconfigurationException, match="must implement `task_losses"):
        fit(module, make_batches(1))
