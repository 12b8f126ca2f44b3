"""Train the point from one start, and record its trajectory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cost import SymmetryTeleportCallback, TeleportReport
from recipes.toy.model import ToyModel
from recipes.toy.problem import gap_to_front, toy_losses

__all__ = ["REACHED", "Run", "train"]

REACHED = 1e-3
"""The Pareto front counts as reached if both losses can fall by no more than this."""


@dataclass(frozen=True)
class Run:
    """One trajectory of the point.

    Attributes:
        points: The start, then the point after each step, shape (steps + 1, 2).
        gaps: By how much both losses can still fall at each point.
        jumps: The point before and after each teleport, shape (teleports, 2, 2).
        reports: The teleports that were tried.
    """

    points: Tensor
    gaps: list[float]
    jumps: Tensor
    reports: list[TeleportReport]

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.points) - 1

    @property
    def largest_rise(self) -> float:
        """The largest rise of the mean loss by one teleport; NaN without a teleport."""
        before, after = toy_losses(self.jumps.double()).mean(dim=-1).unbind(1)
        return max((after - before).tolist(), default=math.nan)

    @property
    def reached(self) -> bool:
        """Whether it ended at the Pareto front."""
        return self.gaps[-1] <= REACHED


class _Trajectory(L.Callback):
    """Records the points, and stops training at the Pareto front."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []
        self.gaps: list[float] = []
        self.jumps: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._record(pl_module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # The teleport callback comes first, so this sees its teleports.
        before, after = self.points[-1], _point(pl_module)
        if not torch.equal(before, after):
            self.jumps.append(torch.stack([before, after]))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._record(pl_module)
        if self.gaps[-1] <= REACHED:
            trainer.should_stop = True

    def _record(self, module: L.LightningModule) -> None:
        self.points.append(_point(module))
        self.gaps.append(gap_to_front(self.points[-1]))


def _point(module: L.LightningModule) -> Tensor:
    assert isinstance(module, ToyModel)
    return module.point


def train(model: ToyModel, steps: int, teleport: SymmetryTeleportCallback | None = None) -> Run:
    """Train until the Pareto front is reached, for one epoch of at most so many steps, without COST or with it."""
    trajectory = _Trajectory()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        # Logging takes as long as everything else in a step with two parameters.
        barebones=True,
        callbacks=[trajectory] if teleport is None else [teleport, trajectory],
    )
    trainer.fit(model, DataLoader([torch.ones(1, 1)] * steps, batch_size=None))
    jumps = torch.stack(trajectory.jumps) if trajectory.jumps else torch.empty(0, 2, 2)
    reports = [] if teleport is None else teleport.reports
    return Run(torch.stack(trajectory.points), trajectory.gaps, jumps, reports)
