"""A short fit of a recipe on one of several ranks, in a module that their processes can import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torchjd.aggregation import UPGrad

from lightning_cost import SymmetryTeleportCallback
from recipes.celeba import CelebADataModule, CelebAModel
from recipes.celeba.bars import AttributeBars
from recipes.dense.last_epochs import LastEpochsMean
from recipes.dense.pictures import ConfusionMatrixPlot, DensePictures
from recipes.nyuv2 import NYUv2DataModule, NYUv2Model
from recipes.qm9.data import QM9DataModule
from recipes.qm9.model import QM9Model
from tests.support.dense_models import TINY
from tests.support.nets import make_trainer
from tests.support.qm9_runs import NARROW, SIZES

Parts = tuple[L.LightningModule, L.LightningDataModule, list[Callback]]


def nyuv2(root: Path, folder: Path) -> Parts:
    # Over pixels: an average over batches depends on which examples share one.
    model = NYUv2Model(network="segnet", widths=TINY, mtl_method=UPGrad(), average="pixels")
    callbacks = [DensePictures(1, 1, folder), ConfusionMatrixPlot(1, folder), LastEpochsMean()]
    return model, NYUv2DataModule(root, batch_size=2), callbacks


def celeba(root: Path, folder: Path) -> Parts:
    model = CelebAModel(("Male", "Smiling", "Young"), width=2, mtl_method=UPGrad())
    data = CelebADataModule(root, batch_size=4, image_size=8, num_workers=1, cache_dir=folder)
    return model, data, [AttributeBars(folder)]


def qm9(root: Path, folder: Path) -> Parts:
    model = QM9Model(["mu", "homo"], **NARROW, mtl_method=UPGrad())
    return model, QM9DataModule(cache_dir=root, targets=["mu", "homo"], batch_size=24, **SIZES), []


def fit(rank: int, make: Callable[[Path, Path], Parts], root: Path, folder: Path) -> dict[str, Any]:
    """Train for an epoch with COST on two ranks; returns the weights and what was logged."""
    torch.manual_seed(0)
    model, data, callbacks = make(root, folder)
    cost = SymmetryTeleportCallback(start_epoch=0)
    trainer = make_trainer(strategy="ddp", devices=2, callbacks=[*callbacks, cost], default_root_dir=folder)
    trainer.fit(model, data)
    return {"weights": model.state_dict(), "logged": logged(trainer), "checked": cost._epoch.checks}


def validate(make: Callable[[Path, Path], Parts], root: Path, folder: Path, weights: Any) -> dict[str, float]:
    """What one process says of the weights."""
    model, data, _ = make(root, folder)
    model.load_state_dict(weights)
    trainer = make_trainer()
    trainer.validate(model, data, verbose=False)
    return logged(trainer)


def logged(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
