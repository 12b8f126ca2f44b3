"""NYUv2: segmentation, depth and surface normals of indoor photographs."""

from typing import ClassVar

from recipes.dense.data import DenseDataModule
from recipes.dense.layout import Layout
from recipes.dense.model import DenseModel

__all__ = ["NYUV2", "NYUv2DataModule", "NYUv2Model"]

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
    depth_unit="in meters",
    has_normals=True,
    batch_size=2,
)
"""795 images for training and 654 for validation, of 288 x 384 pixels."""


class NYUv2DataModule(DenseDataModule):
    """Indoor photographs with 13 classes, metric depth and surface normals; see `DenseDataModule`."""

    layout = NYUV2


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
