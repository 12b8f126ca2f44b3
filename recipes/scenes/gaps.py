"""Where the truth is not known: what real sensors and annotators leave out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from recipes.scenes.render import Frame

__all__ = ["NEAREST", "room_gaps", "street_gaps"]

Rng = np.random.Generator
NEAREST = 1 / 0.4922
"""Distance of the nearest thing with a known depth in a street, in metres: CityScapes' inverse depths end at 0.4922."""


def room_gaps(frame: Frame, rng: Rng) -> Frame:
    """Take the truth away where NYUv2 has none.

    That is all of it along the border, depth and normals in a few patches (the sensor sees no reflection there), and
    labels in other patches and at some of the pixels where one class meets another.

    Args:
        frame: A picture of a room, its truth complete.
        rng: Decides where.
    """
    height, width = frame.label.shape
    border = torch.ones(height, width, dtype=torch.bool)
    thick = max(1, round(0.015 * width))
    border[thick:-thick, thick:-thick] = False
    no_depth = border | _patches(rng, height, width, int(rng.integers(2, 6)))
    edges = _edges(frame.label) & torch.from_numpy(rng.random((height, width)) < 0.4)
    no_label = border | edges | _patches(rng, height, width, int(rng.integers(0, 3)))
    return replace(
        frame,
        label=frame.label.masked_fill(no_label, -1),
        depth=frame.depth.masked_fill(no_depth, 0.0),
        normal=frame.normal.masked_fill(no_depth[..., None], 0.0),
    )


def street_gaps(frame: Frame, rng: Rng) -> Frame:
    """Take the truth away where CityScapes has none, and draw the bonnet of the car that the camera is in.

    The bonnet has neither label nor depth. Labels are also missing along the border, and depths along the left edge
    (which only one camera of a stereo pair sees), in a few patches, and nearer than `NEAREST`. The sky has a label and
    no depth.

    Args:
        frame: A picture of a street, its truth complete; the normals are left alone.
        rng: Decides where.
    """
    height, width = frame.label.shape
    down, across = torch.arange(height)[:, None] / height, torch.arange(width) / width - 0.5
    # How far below the edge of the bonnet, in heights of the image.
    below = down - rng.uniform(0.9, 0.95) - 0.25 * across.square()
    bonnet = below > 0
    lacquer = torch.tensor(rng.uniform(0.1, 0.25, 3), dtype=torch.float32) + 2.5 * below.clamp(0, 0.1)[..., None]

    border = torch.ones(height, width, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    no_depth = bonnet | _patches(rng, height, width, int(rng.integers(2, 6))) | (frame.depth < NEAREST)
    no_depth[:, : max(1, round(0.03 * width))] = True
    return replace(
        frame,
        image=torch.where(bonnet[..., None], lacquer, frame.image),
        label=frame.label.masked_fill(bonnet | border, -1),
        depth=frame.depth.masked_fill(no_depth, 0.0),
    )


def _patches(rng: Rng, height: int, width: int, count: int) -> Tensor:
    """The union of some small ellipses."""
    down, across = torch.arange(height)[:, None], torch.arange(width)
    inside = torch.zeros(height, width, dtype=torch.bool)
    for _ in range(count):
        row, column = rng.uniform(0, height), rng.uniform(0, width)
        tall, wide = rng.uniform(0.01, 0.08, 2) * height
        inside |= ((down - row) / tall).square() + ((across - column) / wide).square() < 1
    return inside


def _edges(label: Tensor) -> Tensor:
    """Pixels above or left of one of another class."""
    edges = torch.zeros_like(label, dtype=torch.bool)
    edges[:-1] |= label[:-1] != label[1:]
    edges[:, :-1] |= label[:, :-1] != label[:, 1:]
    return edges
