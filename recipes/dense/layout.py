"""How the data of dense benchmarks lie on disk, as the authors of MTAN published them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from recipes.dense.quantities import DepthMap, Image, Labels, Normals, Quantity

__all__ = ["SIDE_FACTOR", "Layout"]

SIDE_FACTOR = 32
"""What the height and the width of an image must be multiples of: networks halve it five times."""


@dataclass(frozen=True)
class Layout:
    """The folders of a benchmark, `{train,val}/<folder>/<number>.npy`.

    Attributes:
        name: Of the benchmark.
        label_folder: Folder of the labels.
        classes: What the labels stand for, in their order.
        largest_depth: Largest depth.
        depth_unit: Its unit, in words.
        has_normals: Whether there are surface normals.
    """

    name: str
    label_folder: str
    classes: tuple[str, ...]
    largest_depth: float
    depth_unit: str
    has_normals: bool

    @cached_property
    def image(self) -> Quantity:
        """The input."""
        return Image()

    @cached_property
    def tasks(self) -> Mapping[str, Quantity]:
        """The targets, by the names of their tasks."""
        tasks: dict[str, Quantity] = {
            "segmentation": Labels(self.label_folder, len(self.classes)),
            "depth": DepthMap("depth", self.largest_depth, self.depth_unit),
        }
        return tasks | {"normals": Normals()} if self.has_normals else tasks

    def chosen_tasks(self, names: Sequence[str] | None) -> dict[str, Quantity]:
        """Look up some of the tasks, in the order given; None: all.

        Raises:
            ValueError: If there is no name, an unknown one, or one twice.
        """
        if names is None:
            return dict(self.tasks)
        if isinstance(names, str) or not names or len(set(names)) != len(names) or not set(names) <= set(self.tasks):
            raise ValueError(f"tasks={names!r} must name one or more of {tuple(self.tasks)}, each once.")
        return {name: self.tasks[name] for name in names}

    def files(self, tasks: Sequence[str]) -> dict[str, Quantity]:
        """What is read for some tasks: the image and their targets, by the names that a batch has."""
        return {"image": self.image, **self.chosen_tasks(tasks)}

    @property
    def tree(self) -> str:
        """The folders, and what is in them, in words."""
        quantities = (self.image, *self.tasks.values())
        lines = (f"  train/{quantity.folder}/0.npy, 1.npy, ...  {quantity.values}" for quantity in quantities)
        return "\n".join((f"{self.name} has the folders", *lines, "and the same in val/."))
