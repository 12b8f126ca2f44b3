"""A training script as users write it: Lightning launches the other processes. For ``test_launchers.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch
from torchjd.aggregation import UPGrad

from tests.support.nets import Batch, Net, make_batches, make_trainer
from tests.support.teleporting import teleporter


class FaultyNet(Net):
    """Raises an error on one rank, in a teleport or out of one."""

    fault: str = "none"

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        place = "teleport" if self.replaying else "step"
        if self.fault == f"{place} of rank {self.global_rank}" and self.global_step == 2:
            raise ArithmeticError("a fault on one rank")
        return super().task_losses(batch, batch_idx)


class Report(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            state = {name: value.clone() for name, value in pl_module.state_dict().items()}
            torch.save(state, self.path)


def main(strategy: str, fault: str, path: str) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    module = FaultyNet(UPGrad())
    module.fault = fault
    data = [{name: value[0] for name, value in batch.items()} for batch in make_batches(48, size=1)]
    trainer = make_trainer(strategy=strategy, devices=2, callbacks=[teleporter(), Report(Path(path))])
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))


if __name__ == "__main__":
    main(*sys.argv[1:])
