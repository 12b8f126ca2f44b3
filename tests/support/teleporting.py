"""Modules, loaders and spies for tests of the teleport callback."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_cost import MultiTaskMixin, SymmetryTeleportCallback, TaskGradients, TeleportReport
from tests.support.nets import TASKS, Batch, Net, make_mlp


def always(gradients: TaskGradients) -> bool:
    return True


def never(gradients: TaskGradients) -> bool:
    return False


def teleporter(**settings: Any) -> SymmetryTeleportCallback:
    """A callback that tries a teleport at every step."""
    return SymmetryTeleportCallback(**{"trigger": always, "start_epoch": 0, **settings})


class NoisyNet(Net):
    """With BatchNorm and dropout, whose buffers and random numbers a teleport must not disturb."""

    def __init__(self, mtl_method: Any = None, tasks: Any = TASKS) -> None:
        super().__init__(mtl_method, tasks)
        self.backbone = nn.Sequential(make_mlp(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), make_mlp(6, 4))


class StatefulBatches:
    """Ready-made batches in an order that depends on the epoch, resumable in the middle of one."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.epoch = -1
        self.position = 0
        self.resumed = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        if not self.resumed:
            self.epoch, self.position = self.epoch + 1, 0
        self.resumed = False
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[(self.position - 1 + self.epoch) % len(self.batches)]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.resumed = self.position < len(self.batches)


class SaveAt(L.Callback):
    """Saves a checkpoint after an optimizer step."""

    def __init__(self, path: Any, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything of a module that a refused teleport must leave as it was, gradients included."""
    return {
        "parameters": {name: value.detach().clone() for name, value in module.named_parameters()},
        "identities": {name: id(value) for name, value in module.named_parameters()},
        "requires_grad": {name: value.requires_grad for name, value in module.named_parameters()},
        "grads": {
            name: None if value.grad is None else value.grad.detach().clone()
            for name, value in module.named_parameters()
        },
        "buffers": {name: value.clone() for name, value in module.named_buffers()},
        "modes": {name: value.training for name, value in module.named_modules()},
        "modules": {name: id(value) for name, value in module.named_modules()},
        "attributes": sorted(name for value in module.modules() for name in vars(value)),
        "keys": list(module.state_dict()),
        "random": random_states(),
    }


def assert_same(after: Any, before: Any, path: str = "") -> None:
    """Equality to the bit, through dictionaries and sequences."""
    assert type(after) is type(before), path
    if isinstance(before, Tensor):
        assert torch.equal(after, before), path
    elif isinstance(before, dict):
        assert list(after) == list(before), path
        for key in before:
            assert_same(after[key], before[key], f"{path}/{key}")
    elif isinstance(before, (list, tuple)):
        assert len(after) == len(before), path
        for index, (one, two) in enumerate(zip(after, before, strict=True)):
            assert_same(one, two, f"{path}/{index}")
    else:
        assert after == before, path


class Spy(L.Callback):
    """Takes snapshots at each optimizer step; put one before and one after the teleport callback."""

    def __init__(self) -> None:
        self.snapshots: list[dict[str, Any]] = []
        self.losses: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.snapshots.append(snapshot(pl_module))


def final_state(module: MultiTaskMixin, trainer: L.Trainer) -> dict[str, Any]:
    optimizer = trainer.optimizers[0].state_dict()["state"]
    return {"module": dict(module.state_dict()), "optimizer": optimizer}


def without_time(reports: list[TeleportReport], traced_from: int = 0) -> list[dict[str, Any]]:
    """The reports without what may differ: the time, and the traces of teleports before a step."""
    return [
        {**vars(report), "seconds": None, "trace": report.trace if report.step >= traced_from else []}
        for report in reports
    ]
