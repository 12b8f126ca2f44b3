"""Trains a small model, is interrupted at an instant, goes on, and compares: one process for many instants."""

from __future__ import annotations

import csv
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torchjd.aggregation import UPGrad

from recipes.common.interruption import LastCheckpoint
from recipes.common.loader import BatchLoader, BatchSampler
from tests.support.nets import Net, make_batches
from tests.support.teleporting import assert_same, teleporter

EPOCHS, BATCHES, SIZE = 3, 4, 8
HOOKS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
)
PLACES = ("task_losses", "teleport", "optimizer")
Instant = tuple[str, int]


class Strikes(L.Callback):
    """Sends the signal at the n-th call of a hook."""

    def __init__(self, instant: Instant | None) -> None:
        self.place, self.left = instant or ("", 0)

    def strike(self, place: str) -> None:
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)


for _name in HOOKS:
    setattr(Strikes, _name, lambda self, *args, name=_name, **kwargs: self.strike(name))


class Model(Net):
    def __init__(self, strikes: Strikes) -> None:
        super().__init__(UPGrad())
        self.make_optimizer = partial(torch.optim.Adam, lr=1e-2)
        self.strikes = [strikes]

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        self.strikes[0].strike("teleport" if self.replaying else "task_losses")
        return super().task_losses(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({f"val/{name}": loss for name, loss in self.losses(batch).items()})

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(lambda *args: self.strikes[0].strike("optimizer"))
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    def train_dataloader(self) -> Any:
        return loader(seed=0)

    def val_dataloader(self) -> Any:
        return loader(seed=None)


def loader(seed: int | None) -> BatchLoader:
    (data,) = make_batches(1, size=BATCHES * SIZE)
    return BatchLoader(
        lambda index: {name: value[index] for name, value in data.items()},
        BatchSampler(BATCHES * SIZE, SIZE, shuffle_seed=seed),
    )


def train(
    folder: Path, instant: Instant | None, ckpt_path: Path | None = None, **settings: Any
) -> dict[str, Any] | None:
    """Train to the end, or until the signal: then nothing is returned."""
    strikes, callback = Strikes(instant), teleporter()
    torch.manual_seed(0)
    module = Model(strikes)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=CSVLogger(folder, name="run"),
        log_every_n_steps=1,
        callbacks=[strikes, callback, LastCheckpoint(dirpath=folder)],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    try:
        trainer.fit(module, ckpt_path=ckpt_path)
    except (SystemExit, KeyboardInterrupt):
        return None
    return {
        "parameters": dict(module.state_dict()),
        "optimizer": trainer.strategy.optimizers and [optimizer.state_dict() for optimizer in trainer.optimizers],
        "rates": [scheduler.scheduler.get_last_lr() for scheduler in trainer.lr_scheduler_configs],
        "reports": [{**vars(report), "seconds": 0, "trace": []} for report in callback.reports],
        "step": trainer.global_step,
    }


def rows(folder: Path) -> list[dict[str, str]]:
    """What has been logged, over all parts of a run."""
    found = [row for path in sorted(folder.glob("run/*/metrics.csv")) for row in csv.DictReader(path.open())]
    return sorted(({k: v for k, v in row.items() if v} for row in found), key=lambda row: sorted(row.items()))


def interrupted(
    folder: Path, instant: Instant, expected: dict[str, Any], logged: list[dict[str, str]], **settings: Any
) -> str:
    """What differs after an interruption and a resume; empty if nothing does."""
    handler = signal.getsignal(signal.SIGINT)
    result = train(folder, instant, **settings)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    checkpoint = folder / "last.ckpt"
    if result is None:
        result = train(folder, None, checkpoint if checkpoint.exists() else None, **settings)
    elif instant[0] not in ("on_save_checkpoint", "on_validation_end", "on_train_epoch_end", "on_validation_batch_end"):
        return f"{instant}: was not interrupted"
    signal.signal(signal.SIGINT, handler)
    try:
        assert result is not None
        assert_same(result, expected)
        assert {tuple(row.items()) for row in rows(folder)} == {tuple(row.items()) for row in logged}
    except AssertionError as error:
        return f"{instant}: {str(error)[:200]}"
    return ""


def main(folder: Path) -> None:
    """Run all instants, and print what differs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    expected = train(folder / "whole", None)
    assert expected is not None
    logged = rows(folder / "whole")
    counts = {name: (1, 3) if "epoch" in name or "validation" in name else (1, 4, 6, 8) for name in HOOKS}
    instants = [(name, count) for name in HOOKS for count in counts[name] if name != "on_train_start" or count == 1]
    instants += [(name, count) for name in PLACES for count in (2, 5)]
    for index, instant in enumerate(instants):
        print(interrupted(folder / str(index), instant, expected, logged), end="\n")
    print("instants", len(instants))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
