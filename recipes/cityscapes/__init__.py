"""CityScapes: segmentation and inverse depth of photographs of streets."""

from typing import ClassVar

from recipes.dense.data import DenseDataModule
from recipes.dense.layout import Layout
from recipes.dense.model import DenseModel

__all__ = ["CITYSCAPES", "CityScapesDataModule", "CityScapesModel"]

CITYSCAPES = Layout(
    name="CityScapes",
    label_folder="label_7",
    classes=("flat", "construction", "object", "nature", "sky", "human", "vehicle"),
    largest_depth=0.4922,
    depth_unit="as its inverse",
    has_normals=False,
    batch_size=8,
)
"""2,975 images for training and 500 for validation, of 128 x 256 pixels."""


class CityScapesDataModule(DenseDataModule):
    """Photographs of streets with 7 classes and inverse depth; see `DenseDataModule`."""

    layout = CITYSCAPES


class CityScapesModel(DenseModel):
    """Segmentation and inverse depth of CityScapes; see `DenseModel`."""

    layout = CITYSCAPES
    published_values: ClassVar = {
        "miou": 0.7401,
        "pixel_accuracy": 0.9316,
        "absolute_error": 0.0125,
        "relative_error": 27.77,
    }
