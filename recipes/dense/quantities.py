"""What the files of a dense benchmark hold: their shapes, types and values on disk, and the tensors made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.dense.losses import IGNORED

__all__ = ["DepthMap", "Image", "Labels", "Normals", "Quantity"]

Array = NDArray[Any]

# Of the range [0, 1] of colours: rounding in half precision.
_ROUNDING = 1e-3
# Of the squared length of a normal: those on disk were resized, some of them in half precision.
_LONGEST = 1.1
# How many times the largest depth of the benchmark a depth may be; units differ by more.
_ANOTHER_UNIT = 2


@dataclass(frozen=True)
class Quantity(ABC):
    """One array an example, in a folder of its own.

    Attributes:
        folder: Name of the folder.
    """

    folder: str

    shapes: ClassVar[tuple[tuple[int, ...], ...]]
    """What may follow height and width in the shape of an array."""
    dtype_kinds: ClassVar[str] = "f"
    """The kinds of numpy's types that an array may have."""
    dtype_names: ClassVar[str] = "floating point numbers"
    """The same in words."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of its prediction."""

    @property
    @abstractmethod
    def values(self) -> str:
        """What an array must hold, in words."""

    @abstractmethod
    def fault(self, array: Array) -> str | None:
        """What is wrong with the values of an array, in words that follow its name; None if nothing is."""

    def to_tensor(self, array: Array) -> Tensor:
        """The values as float32, channels first."""
        channels_last = array.reshape(*array.shape[:2], -1)
        return torch.from_numpy(np.moveaxis(channels_last, -1, 0).astype(np.float32, order="C"))


@dataclass(frozen=True)
class Image(Quantity):
    """Colours."""

    folder: str = "image"
    shapes: ClassVar = ((3,),)
    channels: ClassVar[int] = 3
    values: ClassVar[str] = "red, green and blue from 0 to 1"

    def fault(self, array: Array) -> str | None:
        """Values out of range, or not numbers."""
        low, high = array.min(), array.max()
        return None if low >= -_ROUNDING and high <= 1 + _ROUNDING else f"has values from {low:g} to {high:g}"


@dataclass(frozen=True)
class Labels(Quantity):
    """The class of every pixel.

    Attributes:
        num_classes: Number of classes.
    """

    num_classes: int
    shapes: ClassVar = ((),)
    dtype_kinds: ClassVar[str] = "iuf"
    dtype_names: ClassVar[str] = "numbers"

    @property
    def channels(self) -> int:
        """One logit a class."""
        return self.num_classes

    @property
    def values(self) -> str:
        """The indices of the classes, and what stands for none."""
        return f"whole numbers from 0 to {self.num_classes - 1}, and {IGNORED} where there is no class"

    def fault(self, array: Array) -> str | None:
        """Classes that there are not."""
        low, high = array.min(), array.max()
        # Written so that it is true of what is not a number.
        if not (low >= IGNORED and high < self.num_classes):
            return f"has labels from {low:g} to {high:g}"
        if array.dtype.kind == "f" and (array != np.floor(array)).any():
            return f"has labels between whole numbers, such as {array[array != np.floor(array)][0]:g}"
        return None

    def to_tensor(self, array: Array) -> Tensor:
        """The labels as int64, (H, W)."""
        return torch.from_numpy(array.astype(np.int64, order="C"))


@dataclass(frozen=True)
class DepthMap(Quantity):
    """Depth, metric or inverse.

    Attributes:
        largest: Largest depth of the benchmark. More than twice as much is taken for another unit.
        unit: In words.
    """

    largest: float
    unit: str
    shapes: ClassVar = ((1,), ())
    channels: ClassVar[int] = 1

    @property
    def values(self) -> str:
        """Range and unit."""
        return f"depth {self.unit}, up to about {self.largest:g}, and 0 where it is unknown"

    def fault(self, array: Array) -> str | None:
        """Values that no depth has."""
        low, high = array.min(), array.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            return f"has {(~np.isfinite(array)).sum()} values that are not finite"
        if low < 0:
            return f"has {(array < 0).sum()} negative values, down to {low:g}"
        if high > _ANOTHER_UNIT * self.largest:
            return f"has values up to {high:g}"
        return None


@dataclass(frozen=True)
class Normals(Quantity):
    """Surface normals."""

    folder: str = "normal"
    shapes: ClassVar = ((3,),)
    channels: ClassVar[int] = 3
    values: ClassVar[str] = "vectors of length 1, all zero where there is none"

    def fault(self, array: Array) -> str | None:
        """Vectors that are longer than normals. They may be shorter: resizing averages them."""
        # Fifty times as fast as the sum of the squares along the last axis.
        longest = np.einsum("hwc,hwc->hw", array, array).max()
        if not np.isfinite(longest):
            return "has values that are not finite"
        return None if longest <= _LONGEST else f"has vectors up to length {longest**0.5:g}"
