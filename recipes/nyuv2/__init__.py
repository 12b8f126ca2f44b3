"""NYUv2: segmentation, depth and surface normals of indoor photographs."""

from recipes.nyuv2.data import NYUV2, NYUv2DataModule
from recipes.nyuv2.model import NYUv2Model

__all__ = ["NYUV2", "NYUv2DataModule", "NYUv2Model"]
