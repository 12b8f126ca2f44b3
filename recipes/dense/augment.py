"""The published augmentation: a part of an example is enlarged to the full size, and perhaps mirrored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

__all__ = ["SCALES", "View", "augment"]

SCALES = (1.0, 1.2, 1.5)
"""The factors by which a part may be enlarged."""


@dataclass(frozen=True)
class View:
    """The part of an example that is seen.

    Attributes:
        scale: Factor by which the part is enlarged.
        top: First row of the part.
        left: First column of the part.
        mirrored: Whether left and right are exchanged.
    """

    scale: float
    top: int
    left: int
    mirrored: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, height: int, width: int) -> View:
        """Draw a scale, the place of the part, and whether to mirror it, for an example of some height and width."""
        scale = float(rng.choice(SCALES))
        rows, columns = _part(scale, height, width)
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        return cls(scale, int(top), int(left), bool(rng.random() < 0.5))


def augment(example: Mapping[str, Tensor], view: View) -> dict[str, Tensor]:
    """Show a part of an example.

    Images are interpolated. Labels, depth and normals are taken from the nearest pixel, so that unknown pixels do not
    mix with known ones. What is enlarged is nearer, so depth is divided by the scale. This is right for metric depth
    and wrong for inverse depth, but published code does it for both. Mirroring turns normals to the other side.

    Args:
        example: `image` (3, H, W) and any of `segmentation` (H, W), `depth` (1, H, W) and `normals` (3, H, W).
        view: The part to show.

    Returns:
        New tensors of the same shapes.
    """
    height, width = example["image"].shape[-2:]
    rows, columns = _part(view.scale, height, width)
    seen = {}
    for name, values in example.items():
        # torchvision takes the nearest pixel of masks, whatever the interpolation.
        typed = tv_tensors.Image(values) if name == "image" else tv_tensors.Mask(values)
        typed = F.resized_crop(typed, view.top, view.left, rows, columns, size=[height, width])
        seen[name] = (F.horizontal_flip(typed) if view.mirrored else typed).as_subclass(Tensor)
    if "depth" in seen:
        seen["depth"] = seen["depth"] / view.scale
    if "normals" in seen and view.mirrored:
        seen["normals"] = seen["normals"] * seen["normals"].new_tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    return seen


def _part(scale: float, height: int, width: int) -> tuple[int, int]:
    return int(height / scale), int(width / scale)
