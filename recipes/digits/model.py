"""A small convolutional backbone with one linear head per task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_cost import MultiTaskMixin
from recipes.digits.tasks import TASKS, chosen_tasks

__all__ = ["DigitsModel"]


def _backbone(width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 3 * 3, width), nn.ReLU()),
    )


def _metric(num_classes: int | None) -> Metric:
    return MeanSquaredError() if num_classes is None else MulticlassAccuracy(num_classes, average="micro")


class DigitsModel(MultiTaskMixin, L.LightningModule):
    """Solves some of `TASKS` on overlaid pairs of digits.

    Args:
        tasks: Names of `TASKS`. A single one makes a single-task baseline.
        width: Features that the heads share. 64 is plenty for two digits, 16 is narrow.
        loss_weights: Task to the positive factor of its loss; 1 for other tasks.
        mtl_method: A TorchJD aggregator of the task gradients or scalarizer of the task losses; None for the mean of
            the losses.
        lr: Learning rate of Adam.
        lr_milestones: Increasing epochs. The learning rate is multiplied by `lr_factor` before each of them.
        lr_factor: The positive factor.

    Raises:
        ValueError: If an argument is out of range or names an unknown task.
    """

    shared_module = "backbone"

    def __init__(
        self,
        tasks: Sequence[str] = ("left", "right"),
        width: int = 64,
        loss_weights: Mapping[str, float] | None = None,
        mtl_method: Aggregator | Scalarizer | None = None,
        lr: float = 1e-3,
        lr_milestones: Sequence[int] = (),
        lr_factor: float = 0.1,
    ) -> None:
        super().__init__()
        chosen = chosen_tasks(tasks)
        if width < 1:
            raise ValueError(f"width={width} must be at least 1.")
        for task, weight in (loss_weights or {}).items():
            if task not in tasks:
                raise ValueError(f"loss_weights names {task!r}, which is not among the tasks {tuple(tasks)}.")
            if not 0 < weight < math.inf:
                raise ValueError(f"loss_weights[{task!r}]={weight} must be positive and finite.")
        if any(later <= earlier for earlier, later in pairwise((0, *lr_milestones))):
            raise ValueError(f"lr_milestones={lr_milestones!r} must be epochs from 1 on, in increasing order.")
        if not 0 < lr_factor < math.inf:
            raise ValueError(f"lr_factor={lr_factor} must be positive and finite.")
        self.save_hyperparameters(ignore="mtl_method")
        self.mtl_method = mtl_method
        self.lr, self.lr_milestones, self.lr_factor = lr, tuple(lr_milestones), lr_factor
        self.loss_weights = dict.fromkeys(tasks, 1.0) | dict(loss_weights or {})
        # Pooling is half of the work, and on a CPU it is several times faster in this memory format.
        self.backbone = _backbone(width).to(memory_format=torch.channels_last)
        self.heads = nn.ModuleDict({name: nn.Linear(width, task.num_classes or 1) for name, task in chosen.items()})
        self.metrics = nn.ModuleDict(
            {s: nn.ModuleDict({n: _metric(task.num_classes) for n, task in chosen.items()}) for s in ("val", "test")}
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Predict every task.

        Args:
            image: (B, 1, 12, 12), values in [0, 1].

        Returns:
            Task to logits (B, number of classes) or, for a regression, to values (B,).
        """
        features = self.backbone(image)
        outputs = {name: head(features) for name, head in self.heads.items()}
        return {n: output.squeeze(1) if TASKS[n].num_classes is None else output for n, output in outputs.items()}

    def task_losses(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Weighted cross-entropy of classifications, weighted squared error of regressions."""
        losses = {}
        for name, prediction in self(batch["image"]).items():
            loss = F.mse_loss if TASKS[name].num_classes is None else F.cross_entropy
            losses[name] = self.loss_weights[name] * loss(prediction, batch[name])
        return losses

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log `val/<task>_accuracy`, or `val/<task>_mse` for a regression."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the same metrics under `test/`."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        for name, prediction in self(batch["image"]).items():
            metric = self.metrics[stage][name]
            metric.update(prediction, batch[name])
            self.log(f"{stage}/{name}_{TASKS[name].metric}", metric, prog_bar=True, batch_size=len(prediction))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over backbone and heads, with drops of the learning rate at the milestones."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        if not self.lr_milestones:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, self.lr_milestones, self.lr_factor)]
