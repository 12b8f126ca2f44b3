"""CityScapes as preprocessed by the authors of MTAN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.dense.data import DenseDataModule
from recipes.dense.layout import Layout

__all__ = ["CITYSCAPES", "CityScapesDataModule"]

CITYSCAPES = Layout(
    name="CityScapes",
    label_folder="label_7",
    classes=("flat", "construction", "object", "nature", "sky", "human", "vehicle"),
    largest_depth=0.4922,
    depth_unit="as its inverse",
    has_normals=False,
)
"""2,975 images for training and 500 for validation, of 128 x 256 pixels."""


class CityScapesDataModule(DenseDataModule):
    """Photographs of streets with 7 classes and inverse depth.

    Args:
        root: See `DenseDataModule`, as all others.
        batch_size: See there.
        **kwargs: See there.
    """

    layout = CITYSCAPES

    def __init__(self, root: str | Path, batch_size: int = 8, **kwargs: Any) -> None:
        super().__init__(root, batch_size, **kwargs)
