"""The two parameters as a module that trains like any network."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

from lightning_cost import MultiTaskMixin
from recipes.toy.problem import TASKS, toy_losses

__all__ = ["ToyModel"]


class ToyModel(MultiTaskMixin, L.LightningModule):
    """A linear layer that turns the number 1 into the point (t1, t2); its weight is the point.

    Args:
        start: The first point (t1, t2).
        mtl_method: A TorchJD aggregator of the task gradients or scalarizer of the task losses; None for the mean of
            the losses.
        lr: Learning rate of Adam.
        betas: Betas of Adam. With the usual 0.999, Adam remembers the steep walls of a valley for thousands of steps,
            and its steps stay short for as long.
    """

    shared_module = "backbone"

    def __init__(
        self,
        start: tuple[float, float],
        mtl_method: Aggregator | Scalarizer | None = None,
        lr: float = 0.015,
        betas: tuple[float, float] = (0.9, 0.9),
    ) -> None:
        super().__init__()
        self.mtl_method, self.lr, self.betas = mtl_method, lr, betas
        self.backbone = nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            self.backbone.weight.copy_(torch.tensor(start).unsqueeze(1))

    @property
    def point(self) -> Tensor:
        """A copy of the point (t1, t2), shape (2,)."""
        return self.backbone.weight.detach().flatten().clone()

    def task_losses(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """L1 and L2 at the point, from a batch that is the number 1, shape (1, 1)."""
        return dict(zip(TASKS, toy_losses(self.backbone(batch).squeeze(0)), strict=True))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr, betas=self.betas)
