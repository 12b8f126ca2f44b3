"""What the predictions of a task are judged by."""

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
    """The metrics of a task, in the order of the field's tables. Those that count the same pixels count them once.

    Args:
        task: `segmentation`, `depth` or `normals`.
        channels: Of its prediction.
        average: "batch": depth errors and angles are averaged batch by batch, medians too, as in published tables.
            "pixels": over all pixels. A segmentation is judged by one confusion matrix in any case.

    Returns:
        Name to torchmetrics.
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
