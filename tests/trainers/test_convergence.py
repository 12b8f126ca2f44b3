"""Theorem 1 on a smooth problem: teleports that keep the losses leave the rate of gradient descent as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cost import MultiTaskMixin, SymmetryTeleportCallback
from tests.support.nets import make_trainer

pytestmark = pytest.mark.slow

TASKS = ("left", "right", "ink")
DIMENSIONS = 12
TOLERANCE = 1e-3


class Valleys(MultiTaskMixin, L.LightningModule):
    r"""Losses :math:`\sum_j \sqrt{1 + (A_k \theta - b_k)_j^2}`, whose gradients are :math:`|A_k|^2`-Lipschitz."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        scales = (1.0, 0.3, 0.1)
        self.matrices = [scale * draw(4, DIMENSIONS) for scale in scales]
        self.targets = [3 * draw(4) for _ in scales]
        self.backbone = nn.Linear(DIMENSIONS, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.backbone.weight.copy_(draw(1, DIMENSIONS))
        # Of the mean of the losses, and of each of them.
        smoothness = max(float(torch.linalg.matrix_norm(matrix, 2)) ** 2 for matrix in self.matrices)
        self.step_size = 1 / (smoothness * math.sqrt(num_steps - 1))

    def task_losses(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        theta = self.backbone.weight.flatten()
        return {
            name: (1 + (matrix @ theta - target).square()).sqrt().sum()
            for name, matrix, target in zip(TASKS, self.matrices, self.targets, strict=True)
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.step_size)


class Watch(L.Callback):
    """The mean loss and the Pareto stationarity before each step."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self.stationarity: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.request_task_gradients()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        # After a teleport: the step is taken from there.
        self.means.append(float(sum(pl_module.task_losses(torch.ones(1), 0).values())) / len(TASKS))
        self.stationarity.append(float(pl_module.task_gradients.pareto_stationarity))


def train(num_steps: int, callback: SymmetryTeleportCallback | None) -> tuple[Valleys, Watch]:
    module, watch = Valleys(num_steps), Watch()
    callbacks: list[L.Callback] = [watch] if callback is None else [callback, watch]
    trainer = make_trainer(callbacks=callbacks)
    trainer.fit(module, DataLoader([torch.ones(1)] * num_steps, batch_size=None))
    return module, watch


@pytest.mark.parametrize("num_steps", [10, 80])
@pytest.mark.parametrize(
    "make_callback",
    [
        lambda: None,
        lambda: SymmetryTeleportCallback(trigger=lambda gradients: True, start_epoch=0, tolerance=TOLERANCE),
    ],
    ids=["descent", "teleports"],
)
def test_the_smallest_pareto_stationarity_falls_at_the_rate_of_descent(
    make_callback: Callable[[], SymmetryTeleportCallback | None], num_steps: int
) -> None:
    callback = make_callback()
    module, watch = train(num_steps, callback)
    rises = 0.0
    if callback is not None:
        accepted = [report for report in callback.reports if report.accepted]
        assert len(accepted) >= num_steps / 5
        rises = sum(sum(r.losses_after.values()) - sum(r.losses_before.values()) for r in accepted) / len(TASKS)
        # They hold the losses, and move.
        assert all(report.drift <= TOLERANCE for report in accepted)
    # Descent on a smooth function lowers it by at least eta / 2 |g_0|^2 a step, and the shortest convex combination
    # is no longer than g_0. So the least of T steps is below 2 (fall + rises) / (eta T), which falls like 1 / sqrt(T).
    fall = watch.means[0] - float(sum(module.task_losses(torch.ones(1), 0).values())) / len(TASKS)
    bound = 2 * (fall + rises) / (module.step_size * num_steps)
    assert min(watch.stationarity) ** 2 <= bound * (1 + 1e-9)
    # The bound is that of descent: what teleports add is within their tolerance.
    assert abs(rises) <= 0.05 * watch.means[0]


def test_longer_runs_come_nearer_to_a_pareto_stationary_point() -> None:
    found = []
    for num_steps in (10, 20, 40):
        callback = SymmetryTeleportCallback(start_epoch=0, tolerance=TOLERANCE)
        found.append(min(train(num_steps, callback)[1].stationarity))
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]
