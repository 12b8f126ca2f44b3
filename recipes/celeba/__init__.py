"""CelebA: 40 attributes of faces, from the files that users have."""

from recipes.celeba.data import CelebADataModule
from recipes.celeba.model import CelebAModel

__all__ = ["CelebADataModule", "CelebAModel"]
