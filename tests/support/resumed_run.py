"""The run that tests interrupt and resume, and a program that is killed in the middle of it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torchjd.aggregation import (
    PCD,
    CRMOGMWeighting,
    ExcessMTL,
    GradVac,
    GradVacWeighting,
    GramianWeightedAggregator,
    NashMTL,
    UPGrad,
)
from torchjd.scalarization import DWA, FAMO, IMTLL, UW, Random

from lightning_cost import ConflictAlignment, LevelSetSearch, PenaltySearch, RandomDirection, SymmetryTeleportCallback
from tests.support.nets import Net, Seeds, make_batches, make_trainer
from tests.support.teleporting import StatefulBatches, teleporter

BATCHES = 5
EPOCHS = 3

ADAM = partial(torch.optim.Adam, lr=1e-2)
MOMENTUM = partial(torch.optim.SGD, lr=2e-2, momentum=0.9)

# What the callback gets, the optimizer, and the number of accumulated batches.
RUNS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "level set": ({}, ADAM, 1),
    "random direction": ({"objective": RandomDirection()}, MOMENTUM, 1),
    "penalty, sharpness": (
        {
            "search": PenaltySearch(steps=3, lr=1e-2, gamma=10.0),
            "objective": "sharpness",
            "tolerance": None,
            "max_per_epoch": 3,
        },
        ADAM,
        1,
    ),
    "paper history": ({"history": "paper"}, ADAM, 1),
    "momentum history": ({"history": "momentum"}, MOMENTUM, 1),
    "2 an epoch": ({"max_per_epoch": 2, "history": "momentum"}, ADAM, 1),
    "every 2nd step": ({"check_every_n_steps": 2}, MOMENTUM, 1),
    "2 steps, double backward": (
        {"search": LevelSetSearch(steps=2), "objective": ConflictAlignment(derivative="double_backward")},
        ADAM,
        1,
    ),
    "accumulation": ({}, ADAM, 2),
    "accumulation, momentum history": ({"history": "momentum"}, MOMENTUM, 2),
}
METHODS: dict[str, Any] = {"LS": None, "UPGrad": UPGrad}

# The methods that remember something from step to step, and those that draw random numbers.
REMEMBERING: dict[str, Callable[[], Any]] = {
    "RLW": Random,
    "DWA": DWA,
    "UW": partial(UW, 3),
    "IMTL-L": partial(IMTLL, 3),
    "FAMO": partial(FAMO, 3, lr=0.3),
    "GradVac": GradVac,
    "PCD": PCD,
    "Nash-MTL": partial(NashMTL, 3, update_weights_every=2, optim_niter=2),
    "ExcessMTL": partial(ExcessMTL, n_warmup_steps=6),
    "CR-MOGM": lambda: GramianWeightedAggregator(CRMOGMWeighting(GradVacWeighting())),
}


class SaveAfter(L.Callback):
    """Saves a checkpoint after each of some batches, counted over the epochs."""

    def __init__(self, folder: Path, batches: Any) -> None:
        self.folder, self.batches = folder, batches
        self.count = 0

    def path(self, batch: int) -> Path:
        return self.folder / f"after-{batch}.ckpt"

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.count += 1
        if self.count in self.batches:
            trainer.save_checkpoint(self.path(self.count))


def run(
    name: str, method: str, extra: list[Any], ckpt_path: Any = None, make: Any = Net, **settings: Any
) -> tuple[Net, L.Trainer, SymmetryTeleportCallback]:
    torch.manual_seed(5)
    chosen, optimizer, accumulated = RUNS[name]
    create = {**METHODS, **REMEMBERING}[method]
    module = make(create() if create else None)
    module.make_optimizer = optimizer
    callback = teleporter(**{**chosen, **settings})
    callbacks = [Seeds(), callback, *extra]
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=callbacks, accumulate_grad_batches=accumulated)
    trainer.fit(module, StatefulBatches(make_batches(BATCHES)), ckpt_path=ckpt_path)
    return module, trainer, callback


class KillAfterTeleport(L.Callback):
    """Kills the process as soon as a teleport was accepted after some step, before its step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        (callback,) = (item for item in trainer.callbacks if isinstance(item, SymmetryTeleportCallback))
        report = callback.reports[-1]
        if report.accepted and report.step == trainer.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Save after a batch, and be killed some steps later: one process for every run that is named."""
    folder, saved, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        # Imports take most of the time of a process. Nothing was differentiated yet, so that a copy can do it.
        child = os.fork()
        if child == 0:
            run(name, "UPGrad", [SaveAfter(Path(folder, name), {int(saved)}), KillAfterTeleport(int(saved) + 1)])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


if __name__ == "__main__":
    main()
