"""Furnished rooms in NYUv2's arrays."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from recipes.scenes.render import Camera, Color, Look, Part, Rng, Solid, assemble, photograph, render, spots

__all__ = ["CLASSES", "FOCAL", "draw_room", "make_room"]

# The color camera of the Kinect: 518.9 pixels at 640 columns.
FOCAL = 0.81
_WOOD: tuple[Color, ...] = ((0.45, 0.28, 0.15), (0.62, 0.43, 0.25), (0.3, 0.18, 0.1))
# In the order of NYUv2's labels.
_LOOKS: dict[str, Look] = {
    "bed": Look(0, ((0.35, 0.45, 0.75), (0.55, 0.65, 0.9)), (0.85, 0.87, 0.95), (0.5, math.inf)),
    "books": Look(1, ((0.9, 0.8, 0.3), (0.9, 0.5, 0.4)), (0.2, 0.15, 0.45), (0.09, math.inf)),
    "ceiling": Look(2, ((0.92, 0.92, 0.9),)),
    "chair": Look(3, ((0.85, 0.55, 0.2), (0.95, 0.75, 0.4))),
    "floor": Look(4, _WOOD, (0.55, 0.42, 0.3), (0.3, math.inf)),
    "furniture": Look(5, _WOOD, (0.5, 0.33, 0.2), (0.5, 0.42)),
    "objects": Look(6, ((0.2, 0.6, 0.25), (0.85, 0.25, 0.2), (0.95, 0.75, 0.15)), round=True),
    "painting": Look(7, ((0.75, 0.6, 0.2), (0.15, 0.1, 0.08)), (0.7, 0.25, 0.5), (0.4, 0.35)),
    "sofa": Look(8, ((0.55, 0.15, 0.15), (0.15, 0.4, 0.3))),
    "table": Look(9, ((0.75, 0.6, 0.4), (0.6, 0.45, 0.3))),
    "TV": Look(10, ((0.07, 0.07, 0.09),), (0.1, 0.2, 0.3), (1.4, 0.9)),
    "wall": Look(11, ((0.82, 0.78, 0.68), (0.7, 0.78, 0.72), (0.8, 0.72, 0.7), (0.72, 0.76, 0.82))),
    "window": Look(12, ((0.92, 0.92, 0.9),), (0.75, 0.9, 1.0), (0.6, 0.55)),
}
CLASSES = tuple(_LOOKS)
# The back of a piece is at z = 0; tables, chairs and what lies on the floor have their middle there.
_AT_WALL: dict[str, list[Part]] = {
    "bed": [("bed", 0, 0, 1, 1.5, 0.5, 2), ("bed", 0, 0, 0.05, 1.5, 0.95, 0.1)],
    "sofa": [
        ("sofa", 0, 0, 0.45, 1.8, 0.42, 0.9),
        ("sofa", 0, 0, 0.1, 1.8, 0.85, 0.2),
        *(("sofa", x, 0, 0.45, 0.2, 0.62, 0.9) for x in (-0.85, 0.85)),
    ],
    "cabinet": [
        ("furniture", 0, 0, 0.25, 1.4, 0.85, 0.5),
        ("objects", -0.4, 0.85, 0.25, 0.3, 0.4, 0.3),
        ("books", 0.3, 0.85, 0.25, 0.5, 0.22, 0.2),
    ],
    "TV": [("furniture", 0, 0, 0.2, 1.4, 0.45, 0.4), ("TV", 0, 0.45, 0.2, 1.2, 0.7, 0.06)],
    "shelf": [
        ("furniture", 0, 0, 0.02, 1.1, 1.9, 0.04),
        *(("furniture", x, 0, 0.17, 0.05, 1.9, 0.34) for x in (-0.55, 0.55)),
        *(("furniture", 0, y, 0.17, 1.1, 0.05, 0.34) for y in (0, 0.45, 0.9, 1.35, 1.85)),
        *(("books", 0, y, 0.17, 1, 0.32, 0.26) for y in (0.05, 0.5, 0.95, 1.4)),
    ],
}
_HANGING: dict[str, list[Part]] = {
    "window": [("window", 0, 1, 0.02, 1.2, 1.1, 0.04)],
    "painting": [("painting", 0, 1.25, 0.02, 0.8, 0.7, 0.04)],
    "TV": [("TV", 0, 1.1, 0.04, 1.2, 0.7, 0.08)],
}
_TABLE: list[Part] = [
    ("table", 0, 0.7, 0, 1.3, 0.06, 0.8),
    *(("table", x, 0, z, 0.06, 0.7, 0.06) for x in (-0.6, 0.6) for z in (-0.35, 0.35)),
    ("objects", -0.3, 0.76, 0, 0.25, 0.3, 0.25),
    ("books", 0.3, 0.76, 0.1, 0.35, 0.12, 0.25),
]
_CHAIR: list[Part] = [
    ("chair", 0, 0.42, 0, 0.45, 0.06, 0.45),
    ("chair", 0, 0.48, -0.2, 0.45, 0.48, 0.05),
    *(("chair", x, 0, z, 0.06, 0.42, 0.06) for x in (-0.19, 0.19) for z in (-0.19, 0.19)),
]
_ON_FLOOR: list[list[Part]] = [[("objects", 0, 0, 0, 0.4, 0.5, 0.4)], [("books", 0, 0, 0, 0.4, 0.2, 0.3)]]


def draw_room(rng: Rng) -> tuple[list[Solid], Camera]:
    """Furnish a room, and look at it from its near end. The origin is the middle of the floor."""
    half_width, half_length, height = rng.uniform((1.8, 2.2, 2.3), (2.5, 2.9, 2.8))
    width, length = 2 * half_width + 2, 2 * half_length + 2
    shell: list[Part] = [
        ("floor", 0, -1, 0, width, 1, length),
        ("ceiling", 0, height, 0, width, 1, length),
        ("wall", 0, 0, -half_length - 0.5, width, height, 1),
        ("wall", -half_width - 0.5, 0, 0, 1, height, length),
        ("wall", half_width + 0.5, 0, 0, 1, height, length),
    ]
    piece = partial(assemble, rng, _LOOKS)
    solids = piece(shell, spread=0)
    places = [(x * half_width, -half_length, 0.0) for x in (-0.5, 0.5)]
    places += [(side * half_width, rng.uniform(-0.1, 0.5), -side * math.pi / 2) for side in (-1, 1)]
    for place, name in zip(places, rng.permutation(list(_AT_WALL)), strict=False):
        solids += piece(_AT_WALL[name], place)
        if name != "shelf" and rng.random() < 0.7:
            solids += piece(_HANGING[rng.choice(list(_HANGING))], place)
    if rng.random() < 0.7:
        x, z = rng.uniform(-0.2, 0.2) * half_width, rng.uniform(-0.8, 0)
        solids += piece(_TABLE, (x, z, rng.uniform(-0.3, 0.3)))
        for side in rng.permutation((-1, 1))[: rng.integers(1, 3)]:
            solids += piece(_CHAIR, (x + 0.8 * side, z, -side * rng.uniform(1, 2)))
    for _ in range(rng.integers(1, 4)):
        x, z = rng.uniform(-0.6, 0.6) * half_width, half_length - rng.uniform(1.8, 3)
        solids += piece(_ON_FLOOR[rng.integers(len(_ON_FLOOR))], (x, z, rng.uniform(0, math.pi)))
    position = (rng.uniform(-0.3, 0.3) * half_width, rng.uniform(1.2, 1.7), half_length - rng.uniform(0, 0.3))
    return solids, Camera(np.array(position), rng.uniform(-0.45, 0.45), rng.uniform(-0.25, 0.05), FOCAL)


def make_room(rng: Rng, height: int, width: int) -> dict[str, np.ndarray]:
    """Folder to array of one example. NYUv2 does not know everything either.

    Nothing is known along the border. Depth and normals are missing in a few spots, labels in others and at some of the
    pixels where classes meet.
    """
    frame = render(*draw_room(rng), rng, (height, width), haze=30)
    label, no_depth, no_label = frame.label, spots(rng, height, width), spots(rng, height, width)
    is_edge = (np.diff(label, axis=0, prepend=-1) != 0) | (np.diff(label, axis=1, prepend=-1) != 0)
    no_label |= is_edge & (rng.random(label.shape) < 0.4)
    return {
        "image": photograph(frame.image, rng),
        "label": np.where(no_label, -1, label),
        "depth": np.where(no_depth, 0, frame.depth)[..., None].astype(np.float32),
        "normal": np.where(no_depth[..., None], 0, frame.normal).astype(np.float32),
    }
