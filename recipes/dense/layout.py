"""The files of a dense benchmark, as the authors of MTAN published them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.dense.losses import IGNORED

__all__ = ["SIDE_FACTOR", "Layout", "Quantity"]

Array = NDArray[Any]

SIDE_FACTOR = 32
"""Height and width of an image must be multiples of this, because the networks halve it five times."""

# How far a color may leave [0, 1]: half precision rounds.
_ROUNDING = 1e-3
# The largest squared length of a normal. The published normals were resized, some of them in half precision.
_LONGEST = 1.1
# A depth above this multiple of the benchmark's largest depth must have another unit.
_ANOTHER_UNIT = 2


@dataclass(frozen=True)
class Quantity:
    """What an example has in one of the folders: an array of height, width and perhaps channels.

    Attributes:
        folder: Name of the folder.
        channels: Number of channels of a prediction.
        values: What the array must hold, in words.
        find_fault: Says what is wrong with the values of an array, or returns None.
        shapes: What may follow height and width in the shape of the array.
        is_labels: Whether the values are classes, which may be stored as any numbers.
    """

    folder: str
    channels: int
    values: str
    find_fault: Callable[[Array], str | None]
    shapes: tuple[tuple[int, ...], ...] = ((3,),)
    is_labels: bool = False

    def path(self, split: Path, number: int) -> Path:
        """The file of an example."""
        return split / self.folder / f"{number}.npy"

    def to_tensor(self, array: Array) -> Tensor:
        """Convert labels to int64 (H, W), and all else to float32 (channels, H, W)."""
        if self.is_labels:
            return torch.from_numpy(array.astype(np.int64, order="C"))
        channels_last = array.reshape(*array.shape[:2], -1)
        return torch.from_numpy(np.moveaxis(channels_last, -1, 0).astype(np.float32, order="C"))


@dataclass(frozen=True)
class Layout:
    """A benchmark: its folders `{train,val}/<folder>/<number>.npy` and what they hold.

    Attributes:
        name: Name of the benchmark.
        label_folder: Folder of the labels.
        classes: Names of the classes, in the order of their labels.
        largest_depth: Largest depth in the data.
        depth_unit: Unit of the depth, in words.
        has_normals: Whether there are surface normals.
        batch_size: Published batch size.
    """

    name: str
    label_folder: str
    classes: tuple[str, ...]
    largest_depth: float
    depth_unit: str
    has_normals: bool
    batch_size: int

    @cached_property
    def image(self) -> Quantity:
        """The input."""
        return Quantity("image", 3, "red, green and blue from 0 to 1", _image_fault)

    @cached_property
    def tasks(self) -> Mapping[str, Quantity]:
        """Task to its target."""
        number = len(self.classes)
        labels = f"whole numbers from 0 to {number - 1}, and {IGNORED} where there is no class"
        depth = f"depth {self.depth_unit}, up to about {self.largest_depth:g}, and 0 where it is unknown"
        normals = "vectors of length 1, all zero where there is none"
        label_fault, depth_fault = partial(_label_fault, number), partial(_depth_fault, self.largest_depth)
        tasks = {
            "segmentation": Quantity(self.label_folder, number, labels, label_fault, ((),), is_labels=True),
            "depth": Quantity("depth", 1, depth, depth_fault, ((1,), ())),
        }
        return tasks | {"normals": Quantity("normal", 3, normals, _normal_fault)} if self.has_normals else tasks

    def chosen_tasks(self, names: Sequence[str] | None) -> dict[str, Quantity]:
        """Look up some of the tasks in the order given, or all of them if `names` is None.

        Raises:
            ValueError: If there is no name, an unknown one, or one twice.
        """
        if names is None:
            return dict(self.tasks)
        if isinstance(names, str) or not names or len(set(names)) != len(names) or not set(names) <= set(self.tasks):
            raise ValueError(f"tasks={names!r} must name one or more of {tuple(self.tasks)}, each once.")
        return {name: self.tasks[name] for name in names}

    def files(self, tasks: Sequence[str]) -> dict[str, Quantity]:
        """What is read for some tasks, by the keys of a batch: the image and their targets."""
        return {"image": self.image, **self.chosen_tasks(tasks)}

    @property
    def tree(self) -> str:
        """The folders and what they hold, in words."""
        quantities = (self.image, *self.tasks.values())
        lines = (f"  train/{quantity.folder}/0.npy, 1.npy, ...  {quantity.values}" for quantity in quantities)
        return "\n".join((f"{self.name} has the folders", *lines, "and the same in val/."))


def _image_fault(array: Array) -> str | None:
    low, high = array.min(), array.max()
    return None if low >= -_ROUNDING and high <= 1 + _ROUNDING else f"has values from {low:g} to {high:g}"


def _label_fault(num_classes: int, array: Array) -> str | None:
    low, high = array.min(), array.max()
    # Comparisons with NaN are false, so this finds NaN as well.
    if not (low >= IGNORED and high < num_classes):
        return f"has labels from {low:g} to {high:g}"
    if array.dtype.kind == "f" and (array != np.floor(array)).any():
        return f"has labels between whole numbers, such as {array[array != np.floor(array)][0]:g}"
    return None


def _depth_fault(largest: float, array: Array) -> str | None:
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"has {(~np.isfinite(array)).sum()} values that are not finite"
    if low < 0:
        return f"has {(array < 0).sum()} negative values, down to {low:g}"
    return f"has values up to {high:g}" if high > _ANOTHER_UNIT * largest else None


def _normal_fault(array: Array) -> str | None:
    # Vectors may be too short, because resizing averages them. `einsum` is fifty times as fast as `(array**2).sum(-1)`.
    longest = np.einsum("hwc,hwc->hw", array, array).max()
    if not np.isfinite(longest):
        return "has values that are not finite"
    return None if longest <= _LONGEST else f"has vectors up to length {longest**0.5:g}"
