"""Train the point from one start, and keep its way."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cost import SymmetryTeleportCallback, TeleportReport
from recipes.toy.model import ToyModel
from recipes.toy.problem import gap_to_front

__all__ = ["REACHED", "Run", "Trajectory", "train"]

# Of one worker, of `log` while nothing is logged, and of Lightning's own use of an older PyTorch function.
_EXPECTED = (".*does not have many workers", "You are trying to `self.log", ".*LeafSpec.* is deprecated")

REACHED = 1e-3
"""The Pareto front counts as reached where both losses can fall by no more than this."""


class Trajectory(L.Callback):
    """Keeps where the point was, and stops training at the Pareto front.

    Put it after other callbacks, so that it sees their teleports.

    Attributes:
        points: The start, then the point after each step.
        gaps: By how much both losses can still fall at each of them.
        jumps: The point before and after each teleport.
    """

    def __init__(self) -> None:
        self.points: list[Tensor] = []
        self.gaps: list[float] = []
        self.jumps: list[tuple[Tensor, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the start."""
        self._keep(_point(pl_module))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the jump, if the point moved since the last step."""
        point = _point(pl_module)
        if not torch.equal(point, self.points[-1]):
            self.jumps.append((self.points[-1], point))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the point, and stop if it is at the front."""
        self._keep(_point(pl_module))
        if self.gaps[-1] <= REACHED:
            trainer.should_stop = True

    def _keep(self, point: Tensor) -> None:
        self.points.append(point)
        self.gaps.append(gap_to_front(point))


def _point(module: L.LightningModule) -> Tensor:
    assert isinstance(module, ToyModel)
    return module.point


@dataclass(frozen=True)
class Run:
    """One way of the point.

    Attributes:
        points: The start, then the point after each step, shape (steps + 1, 2).
        gaps: By how much both losses can still fall at each of them, as many.
        jumps: The point before and after each teleport, shape (teleports, 2, 2).
        reports: What was tried.
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
    def reached(self) -> bool:
        """Whether it ended at the Pareto front."""
        return self.gaps[-1] <= REACHED


def train(model: ToyModel, steps: int, teleport: SymmetryTeleportCallback | None = None) -> Run:
    """Train until the Pareto front is reached, or until the steps are used up.

    Args:
        model: The point.
        steps: Most optimizer steps, all of one epoch.
        teleport: COST; None trains without.
    """
    trajectory = Trajectory()
    with _quiet():
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            # Logging would take as long as everything else in a step of two parameters.
            barebones=True,
            callbacks=[trajectory] if teleport is None else [teleport, trajectory],
        )
        trainer.fit(model, DataLoader([torch.ones(1, 1)] * steps, batch_size=None))
    return Run(
        torch.stack(trajectory.points),
        trajectory.gaps,
        torch.stack([torch.stack(jump) for jump in trajectory.jumps]) if trajectory.jumps else torch.empty(0, 2, 2),
        [] if teleport is None else teleport.reports,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning says at every run: its devices, and that nothing is logged."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)
