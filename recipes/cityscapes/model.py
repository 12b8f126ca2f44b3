"""The LightningModule of CityScapes."""

from __future__ import annotations

from typing import ClassVar

from recipes.cityscapes.data import CITYSCAPES
from recipes.dense.model import DenseModel

__all__ = ["CityScapesModel"]


class CityScapesModel(DenseModel):
    """Segmentation and inverse depth of CityScapes; see `DenseModel`."""

    layout = CITYSCAPES
    published_values: ClassVar = {
        "miou": 0.7401,
        "pixel_accuracy": 0.9316,
        "absolute_error": 0.0125,
        "relative_error": 27.77,
    }
