"""Metrics of dense predictions."""

from __future__ import annotations

from typing import Literal

from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_cost.metrics import (
    AbsoluteDepthError,
    MeanNormalAngle,
    MedianNormalAngle,
    NormalsWithin,
    RelativeDepthError,
)
from recipes.dense.losses import IGNORED

__all__ = ["Average", "make_metrics"]

Average = Literal["batch", "pixels"]


def make_metrics(task: str, channels: int, average: Average) -> MetricCollection:
    """Make the metrics of a task, in the order of published tables. Metrics with equal states share them.

    Args:
        task: `segmentation`, `depth` or `normals`.
        channels: Number of channels of the prediction.
        average: "batch": average depth errors and angles batch by batch, medians too, as in published tables.
            "pixels": average them over all pixels. Segmentation always uses one confusion matrix over the split.
    """
    if task == "segmentation":
        return MetricCollection(
            {
                "miou": MulticlassJaccardIndex(channels, ignore_index=IGNORED),
                "pixel_accuracy": MulticlassAccuracy(channels, average="micro", ignore_index=IGNORED),
            }
        )
    if task == "depth":
        return MetricCollection(
            {"absolute_error": AbsoluteDepthError(average), "relative_error": RelativeDepthError(average)}
        )
    angles = {"mean_angle": MeanNormalAngle(average), "median_angle": MedianNormalAngle(average)}
    within = {f"within_{int(degrees)}": NormalsWithin(degrees, average) for degrees in (11.25, 22.5, 30)}
    return MetricCollection(angles | within)
