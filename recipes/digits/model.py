"""A small convolutional backbone with one linear head a task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_cost import MultiTaskMixin

__all__ = ["DigitsModel"]

NUM_CLASSES = 10
TASKS = ("left", "right", "ink")
METRICS = {"left": "accuracy", "right": "accuracy", "ink": "mse"}


def _backbone(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 3 * 3, width),
        nn.ReLU(),
    )


def _metric(task: str) -> Metric:
    return MeanSquaredError() if task == "ink" else MulticlassAccuracy(NUM_CLASSES, average="micro")


class DigitsModel(MultiTaskMixin, L.LightningModule):
    """Reads both digits of an overlaid pair and, optionally, their difference of ink.

    Args:
        tasks: Some of `left`, `right` and `ink`. One alone gives a single-task baseline.
        width: Features that the backbone hands to the heads. 64 is comfortable for two digits, 16 is narrow.
        loss_weights: Task to the positive factor of its loss; 1 where a task is missing.
        mtl_method: A TorchJD aggregator of the task gradients or scalarizer of the task losses; None for the mean of
            the losses.
        lr: Learning rate of Adam.

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
    ) -> None:
        super().__init__()
        if not tasks or len(set(tasks)) != len(tasks) or not set(tasks) <= set(TASKS):
            raise ValueError(f"tasks={tasks!r} must name one or more of {TASKS}, each once.")
        if width < 1:
            raise ValueError(f"width={width} must be at least 1.")
        for task, weight in (loss_weights or {}).items():
            if task not in tasks:
                raise ValueError(f"loss_weights names {task!r}, which is not among the tasks {tuple(tasks)}.")
            if not 0 < weight < math.inf:
                raise ValueError(f"loss_weights[{task!r}]={weight} must be positive and finite.")
        self.save_hyperparameters(ignore="mtl_method")
        self.mtl_method = mtl_method
        self.lr = lr
        self.loss_weights = dict.fromkeys(tasks, 1.0) | dict(loss_weights or {})
        # On CPUs, pooling is several times faster in this layout, and it is half of the work.
        self.backbone = _backbone(width).to(memory_format=torch.channels_last)
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1 if task == "ink" else NUM_CLASSES) for task in tasks})
        self.metrics = nn.ModuleDict(
            {stage: nn.ModuleDict({task: _metric(task) for task in tasks}) for stage in ("val", "test")}
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Predict every task.

        Args:
            image: (B, 1, 12, 12), values in [0, 1].

        Returns:
            Task to logits (B, 10) of a digit or to the value (B,) of `ink`.
        """
        features = self.backbone(image)
        outputs = {task: head(features) for task, head in self.heads.items()}
        return {task: output.squeeze(1) if task == "ink" else output for task, output in outputs.items()}

    def task_losses(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Weighted cross-entropy of the digits, weighted squared error of the ink."""
        return {
            task: self.loss_weights[task] * (F.mse_loss if task == "ink" else F.cross_entropy)(prediction, batch[task])
            for task, prediction in self(batch["image"]).items()
        }

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log `val/left_accuracy`, `val/right_accuracy` and `val/ink_mse`, as far as there are these tasks."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the same as in validation, under `test/`."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        for task, prediction in self(batch["image"]).items():
            metric = self.metrics[stage][task]
            metric.update(prediction, batch[task])
            self.log(f"{stage}/{task}_{METRICS[task]}", metric, prog_bar=True, batch_size=len(prediction))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over backbone and heads."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)
