"""The mixin takes few names, and a user's module may use all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torchjd.aggregation import UPGrad
from torchjd.scalarization import FAMO

from lightning_cost import MultiTaskMixin
from tests.support.nets import Batch, Net, PlainNet, fit, make_batches, make_mlp
from tests.support.teleporting import teleporter

TAKEN = {
    "shared_module",
    "mtl_method",
    "reduce_dtype",
    "task_gradients_of",
    "weights_every",
    "task_losses",
    "task_gradients",
    "request_task_gradients",
    "replaying",
    "_multi_task",
}


# DDP reads it from the module.
HOOKS = {"_ddp_params_and_buffers_to_ignore"}


FORMER = [
    "task_names",
    "record_batches",
    "recorded_batches",
    "exchange_task_gradients",
    "discard_step",
    "shared_modules",
    "shared_parameters",
    "evaluate_tasks",
    "scalarize",
    "_gradient_buffer",
    "_upkeep",
    "_moved",
    "_ignored",
    "_task_names",
    "_step_losses",
    "_recorded",
    "_to_record",
    "_recording",
    "_requested",
    "_replaying",
    "_has_task_gradients",
    "_unused_since_step",
    "_add_task_gradients",
    "_is_last_micro_batch",
    "_complete_task_gradients",
    "_check_finite",
    "_checked",
    "_common_names",
    "_check_gradients_were_used",
    "_shared_module",
    "step",
    "engine",
    "gradients",
    "losses_of",
    "names",
    "window",
    "accumulator",
    "surface",
]


class Phases(L.Callback):
    """The names of a module beyond those of Lightning, wherever a callback or the module can look."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def look(self, module: L.LightningModule) -> None:
        self.seen |= set(vars(module)) | set(module._modules) | set(module._buffers) | set(module._parameters)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.look(pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.look(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.look(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.look(pl_module)


class Watched(Net):
    """Looks at its own names in each evaluation of its losses, those of a teleport included."""

    phases: Phases

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        self.phases.look(self)
        return super().task_losses(batch, batch_idx)


def test_the_class_takes_no_other_names() -> None:
    added = {name for name in vars(MultiTaskMixin) if name not in dir(L.LightningModule)}
    python = {"__module__", "__doc__", "__annotations__", "__abstractmethods__", "_abc_impl", "__parameters__"}
    assert added - python == TAKEN - {"mtl_method", "_multi_task"} | HOOKS


@pytest.mark.parametrize("make", [lambda: None, UPGrad, lambda: FAMO(3)], ids=["LS", "UPGrad", "FAMO"])
def test_the_instance_takes_no_other_names_in_any_phase(make: Callable[[], Any]) -> None:
    plain, phases = PlainNet(), Phases()
    fit(plain, make_batches(2))
    module = Watched(make())
    module.phases = phases
    fit(module, make_batches(4), callbacks=[Phases(), teleporter(history="paper"), phases], max_epochs=2)
    lightning = set(vars(plain)) | set(plain._modules) | {"phases"}
    # Lightning's own methods are silent while losses are evaluated again.
    assert phases.seen - lightning - {"log", "log_dict"} == {"_multi_task", "mtl_method"}


class Crowded(MultiTaskMixin, PlainNet):
    """Uses every former name of the mixin for itself: for attributes, a submodule and a buffer."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__()
        self.mtl_method = mtl_method
        modules, buffers = {"scalarize", "window", "surface"}, {"shared_modules", "gradients"}
        for name in FORMER:
            if name in modules:
                setattr(self, name, make_mlp(4, 4))
            elif name in buffers:
                self.register_buffer(name, torch.ones(2))
            else:
                setattr(self, name, f"my {name}")

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        return self.losses(batch)


@pytest.mark.parametrize("make", [lambda: None, UPGrad, lambda: FAMO(3)], ids=["LS", "UPGrad", "FAMO"])
def test_a_module_may_use_every_former_name(make: Callable[[], Any]) -> None:
    outcomes = []
    for kind in (Crowded, Net):
        module, callback = kind(make()), teleporter()
        fit(module, make_batches(4), callbacks=[callback], max_epochs=2)
        outcomes.append(([report.accepted for report in callback.reports], module.backbone.state_dict()))
        if kind is Crowded:
            assert module.task_names == "my task_names"
            assert module._recorded == "my _recorded"
    assert outcomes[0][0] == outcomes[1][0]
    assert any(outcomes[0][0])
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1], rtol=0, atol=0)
