"""NYUv2 as preprocessed by the authors of MTAN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.dense.data import DenseDataModule
from recipes.dense.layout import Layout

__all__ = ["NYUV2", "NYUv2DataModule"]

NYUV2 = Layout(
    name="NYUv2",
    label_folder="label",
    classes=(
        "bed",
        "books",
        "ceiling",
        "chair",
        "floor",
        "furniture",
        "objects",
        "painting",
        "sofa",
        "table",
        "TV",
        "wall",
        "window",
    ),
    largest_depth=10.0,
    depth_unit="in metres",
    has_normals=True,
)
"""795 images for training and 654 for validation, of 288 x 384 pixels."""


class NYUv2DataModule(DenseDataModule):
    """Indoor photographs with 13 classes, metric depth and surface normals.

    Args:
        root: See `DenseDataModule`, as all others.
        batch_size: See there.
        **kwargs: See there.
    """

    layout = NYUV2

    def __init__(self, root: str | Path, batch_size: int = 2, **kwargs: Any) -> None:
        super().__init__(root, batch_size, **kwargs)
