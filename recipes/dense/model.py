"""The LightningModule of dense benchmarks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

from lightning_cost import MultiTaskMixin
from lightning_cost.metrics import delta_m
from recipes.common.precision import refuse_half_precision
from recipes.dense.layout import Layout
from recipes.dense.losses import LOSSES
from recipes.dense.metrics import Average, make_metrics
from recipes.dense.mtan import Mtan
from recipes.dense.segnet import WIDTHS, SegNet

__all__ = ["DenseModel", "Network"]

Network = Literal["mtan", "segnet"]


class DenseModel(MultiTaskMixin, L.LightningModule):
    """Predicts classes, depth and surface normals of every pixel.

    It logs `val/<metric>` for the metrics of `make_metrics`, and `val/delta_m`, their mean degradation relative to
    single-task models in percent (Eq. 14 of the COST paper). Tests log the same under `test/`.

    Args:
        tasks: Tasks of the benchmark; None: all. A single task gives a baseline.
        network: "mtan": a SegNet with attention modules for each task. "segnet": without them.
        widths: Features of the five stages.
        share_attention: Whether the attention modules count as shared parameters, as in public code, although each
            gets its gradient from one task. Otherwise the tasks share the trunk only.
        mtl_method: A TorchJD aggregator of the task gradients or scalarizer of the task losses; None: the mean of the
            losses.
        lr: Learning rate of Adam.
        lr_milestones: Epochs, in increasing order, before which the learning rate is multiplied by `lr_factor`.
        lr_factor: The factor, a positive number.
        average: What depth errors and angles are averaged over: "batch", as in published tables, or "pixels".
        single_task_values: Value of each metric for a model that is trained on its task alone; None: the published
            values, which belong to networks of full size.

    Attributes:
        layout: The benchmark.
        published_values: Metric to its published single-task value.

    Raises:
        ValueError: If an argument is out of range, names an unknown task, or a metric has no single-task value.
    """

    layout: ClassVar[Layout]
    published_values: ClassVar[Mapping[str, float]]

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        network: Network = "mtan",
        widths: Sequence[int] = WIDTHS,
        share_attention: bool = False,
        mtl_method: Aggregator | Scalarizer | None = None,
        lr: float = 1e-4,
        lr_milestones: Sequence[int] = (100,),
        lr_factor: float = 0.5,
        average: Average = "batch",
        single_task_values: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        channels = {name: target.channels for name, target in self.layout.chosen_tasks(tasks).items()}
        if network not in get_args(Network):
            raise ValueError(f"network={network!r} must be one of {get_args(Network)}.")
        if share_attention and network != "mtan":
            raise ValueError(
                f"share_attention=True needs network='mtan', because network={network!r} has no attention."
            )
        for name, value in {"lr": lr, "lr_factor": lr_factor}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite.")
        if any(later <= earlier for earlier, later in pairwise((0, *lr_milestones))):
            raise ValueError(f"lr_milestones={lr_milestones!r} must be epochs from 1 on, in increasing order.")
        self.save_hyperparameters(ignore="mtl_method")
        self.mtl_method = mtl_method
        self.tasks = tuple(channels)
        self.lr, self.lr_milestones, self.lr_factor = lr, tuple(lr_milestones), lr_factor
        self.network = (Mtan if network == "mtan" else SegNet)(channels, widths)
        self.shared_module = ["network.trunk", *(["network.attention"] if share_attention else [])]
        metrics = nn.ModuleDict({name: make_metrics(name, size, average) for name, size in channels.items()})
        self.metrics = nn.ModuleDict({"val": metrics, "test": deepcopy(metrics)})
        values = self.published_values if single_task_values is None else single_task_values
        self._baselines = _checked_values(values, [name for of_task in metrics.values() for name in of_task])

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that casts targets to half precision, and data without the targets of a task.

        Raises:
            MisconfigurationException: If the precision would round the targets.
            ValueError: If the data module lacks a task.
        """
        super().setup(stage)
        refuse_half_precision(self.trainer)
        data = getattr(self.trainer, "datamodule", None)
        missing = [name for name in self.tasks if name not in getattr(data, "tasks", self.tasks)]
        if missing:
            raise ValueError(f"The data module has tasks={data.tasks}, but the model is trained on {missing} as well.")

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Predict every task from images with values in [0, 1]; see `SegNet.forward`."""
        predictions: dict[str, Tensor] = self.network(image)
        return predictions

    def task_losses(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Cross-entropy of the classes, absolute error of the depth, one minus the cosine of the normals."""
        return {name: LOSSES[name](prediction, batch[name]) for name, prediction in self(batch["image"]).items()}

    @property
    def _stage(self) -> str:
        return "test" if self.trainer.testing else "val"

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Update the metrics; returns the predictions."""
        predictions = self(batch["image"])
        for name, prediction in predictions.items():
            self.metrics[self._stage][name].update(prediction, batch[name])
        return predictions

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        stage, of_tasks = self._stage, self.metrics[self._stage].values()
        values = {name: value for metrics in of_tasks for name, value in metrics.compute().items()}
        for name, value in values.items():
            if not value.isfinite():
                raise ValueError(
                    f"{stage}/{name} is {float(value)} in epoch {self.current_epoch}: the training has diverged. Lower"
                    f" lr={self.lr}, or clip gradients."
                )
        for metrics in of_tasks:
            metrics.reset()
        # The values are the same in all processes already. Lightning warns unless `sync_dist` is set.
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)
        higher_is_better = [bool(metric.higher_is_better) for metrics in of_tasks for metric in metrics.values()]
        degradation = delta_m(torch.stack(list(values.values())), self._baselines, higher_is_better)
        self.log(f"{stage}/delta_m", degradation, prog_bar=True, sync_dist=True)

    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, whose learning rate drops at the milestones."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.lr_milestones, self.lr_factor)
        return [optimizer], [scheduler]


def _checked_values(values: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The single-task values of some metrics, in their order."""
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"single_task_values={dict(values)} must have a value for each metric; {missing} have none.")
    for name in names:
        if not 0 < values[name] < math.inf:
            raise ValueError(f"single_task_values[{name!r}]={values[name]} must be positive and finite.")
    return [float(values[name]) for name in names]
