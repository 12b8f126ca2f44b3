"""The LightningModule of NYUv2."""

from __future__ import annotations

from typing import ClassVar

from recipes.dense.model import DenseModel
from recipes.nyuv2.data import NYUV2

__all__ = ["NYUv2Model"]


class NYUv2Model(DenseModel):
    """Segmentation, depth and surface normals of NYUv2; see `DenseModel`."""

    layout = NYUV2
    published_values: ClassVar = {
        "miou": 0.3830,
        "pixel_accuracy": 0.6376,
        "absolute_error": 0.6754,
        "relative_error": 0.2780,
        "mean_angle": 25.01,
        "median_angle": 19.21,
        "within_11": 0.3014,
        "within_22": 0.5720,
        "within_30": 0.6915,
    }
