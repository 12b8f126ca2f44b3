"""CityScapes: segmentation and inverse depth of photographs of streets."""

from recipes.cityscapes.data import CITYSCAPES, CityScapesDataModule
from recipes.cityscapes.model import CityScapesModel

__all__ = ["CITYSCAPES", "CityScapesDataModule", "CityScapesModel"]
