"""One example of a data set, as the arrays or the picture in its files: a function of seed, split and index."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from PIL import Image

from recipes.scenes.attributes import draw_attributes
from recipes.scenes.faces import Face, draw_face
from recipes.scenes.gaps import room_gaps, street_gaps
from recipes.scenes.portraits import paint_face
from recipes.scenes.render import Frame, photograph, render
from recipes.scenes.rooms import draw_room
from recipes.scenes.streets import draw_street

__all__ = ["Split", "make_face", "make_room", "make_street", "paint"]


class Split(IntEnum):
    """A part of the data; each has random numbers of its own."""

    TRAIN = 0
    VAL = 1


class _Stream(IntEnum):
    """What the random numbers of a seed are for."""

    ROOM = 0
    STREET = 1
    FACE = 2
    PORTRAIT = 3


def make_room(seed: int, split: Split, index: int, height: int, width: int) -> dict[str, np.ndarray]:
    """The files of an example in NYUv2's layout.

    Args:
        seed: Of the data set.
        split: Part that the example belongs to.
        index: Its number there.
        height: Rows.
        width: Columns.

    Returns:
        `image` float32 (H, W, 3) in [0, 1]; `label` int64 (H, W), -1 where unknown; `depth` float32 (H, W, 1) in
        metres, 0 where unknown; `normal` float32 (H, W, 3) of unit length, 0 where unknown.
    """
    rng = np.random.default_rng((_Stream.ROOM, seed, split, index))
    frame = render(draw_room(rng, height, width))
    frame = room_gaps(frame, rng)
    return _arrays(frame, rng) | {
        "label": frame.label.numpy(),
        "depth": frame.depth[..., None].numpy(),
        "normal": frame.normal.numpy(),
    }


def make_street(seed: int, split: Split, index: int, height: int, width: int) -> dict[str, np.ndarray]:
    """The files of an example in CityScapes' layout.

    Args:
        seed: See `make_room`, as the others.
        split: See there.
        index: See there.
        height: See there.
        width: See there.

    Returns:
        `image` float32 (H, W, 3) in [0, 1]; `label_7` int64 (H, W), -1 where unknown; `depth` float32 (H, W, 1), one
        over the distance in metres, 0 where unknown or infinite.
    """
    rng = np.random.default_rng((_Stream.STREET, seed, split, index))
    frame = street_gaps(render(draw_street(rng, height, width)), rng)
    inverse = torch.where(frame.depth > 0, frame.depth.reciprocal(), 0.0)
    return _arrays(frame, rng) | {"label_7": frame.label.numpy(), "depth": inverse[..., None].numpy()}


def _arrays(frame: Frame, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"image": photograph(frame.image, rng, noise=rng.uniform(0.005, 0.02)).numpy()}


def make_face(seed: int, index: int) -> Face:
    """What a face looks like.

    Args:
        seed: Of the data set.
        index: Number of the face.
    """
    rng = np.random.default_rng((_Stream.FACE, seed, index))
    return draw_face(draw_attributes(rng), rng)


def paint(seed: int, index: int) -> Image.Image:
    """The picture of a face.

    Args:
        seed: See `make_face`.
        index: See there.
    """
    return paint_face(make_face(seed, index), np.random.default_rng((_Stream.PORTRAIT, seed, index)))
