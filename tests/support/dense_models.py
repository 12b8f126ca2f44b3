"""Small dense models, and what a Trainer logged of them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from recipes.dense.model import DenseModel
from recipes.nyuv2 import NYUv2Model

TINY = (2, 4, 4, 4, 4)
Metrics = dict[str, float]


def tiny(model: type[DenseModel] = NYUv2Model, **arguments: Any) -> DenseModel:
    """Always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(widths=TINY, **arguments)


def lively(**arguments: Any) -> DenseModel:
    """One whose predictions differ from pixel to pixel: batch normalization knows the features that it normalizes."""
    model = tiny(**arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(5):
            model(torch.rand(2, 3, 32, 32, generator=generator))
    return model


def logged(trainer: L.Trainer, stage: str = "val") -> Metrics:
    """The metrics of a stage, without its name."""
    metrics = trainer.callback_metrics.items()
    return {name.removeprefix(f"{stage}/"): float(x) for name, x in metrics if name.startswith(f"{stage}/")}
