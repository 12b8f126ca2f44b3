"""Metrics that compare methods, logged in a training run."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.wrappers import Running

from lightning_cost.metrics import DeltaM


class TwoRegressions(L.LightningModule):
    """Logs Δm% of its two validation errors, by epoch and over the last two epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.errors = torch.nn.ModuleDict({"left": MeanMetric(), "right": MeanMetric()})
        baselines, directions = {"left": 0.5, "right": 2.0}, {"left": False, "right": False}
        self.delta_m = DeltaM(baselines, directions)
        self.recent = Running(DeltaM(baselines, directions), window=2)
        self.epochs: list[tuple[float, float]] = []
        self.logged: list[tuple[float, float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return mse_loss(self.layer(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        squared = (self.layer(batch[0]) - batch[1]).square()
        self.errors["left"].update(squared[:, 0])
        self.errors["right"].update(squared[:, 1])

    def on_validation_epoch_end(self) -> None:
        values = {name: error.compute() for name, error in self.errors.items()}
        for error in self.errors.values():
            error.reset()
        self.delta_m.update(values)
        self.log("val/delta_m", self.delta_m)
        if not self.trainer.sanity_checking:
            self.recent.update(values)
            self.log("val/delta_m_recent", self.recent.compute())
            self.epochs.append((values["left"].item(), values["right"].item()))

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.logged.append((metrics["val/delta_m"].item(), metrics["val/delta_m_recent"].item()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_trainer_logs_delta_m_of_each_epoch(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, 12, 2, generator=generator)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=5)
    model = TwoRegressions()
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader, loader)

    by_epoch = [100 * ((left - 0.5) / 0.5 + (right - 2.0) / 2.0) / 2 for left, right in model.epochs]
    assert len(set(by_epoch)) == 3  # the model has moved, so the epochs can be told apart
    recent = [by_epoch[0], sum(by_epoch[:2]) / 2, sum(by_epoch[1:]) / 2]
    # The sanity check's evaluation is in neither, nor is any epoch in the next one's value.
    np.testing.assert_allclose(model.logged, list(zip(by_epoch, recent, strict=True)), rtol=1e-5, atol=1e-5)
