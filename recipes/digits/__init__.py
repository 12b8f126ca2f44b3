"""Two overlaid handwritten digits: multi-task training in seconds, without a download."""

from recipes.digits.data import DigitsDataModule
from recipes.digits.model import DigitsModel

__all__ = ["DigitsDataModule", "DigitsModel"]
