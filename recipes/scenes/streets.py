"""Streets seen from a car, in CityScapes' arrays."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from recipes.scenes.render import Camera, Look, Part, Rng, Solid, assemble, photograph, render, spots

__all__ = ["CLASSES", "FOCAL", "draw_street", "make_street"]

CLASSES = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
# That of CityScapes: 2262 pixels at 2048 columns.
FOCAL = 1.105
_FAR = 110.0
_LARGEST = 0.4922
_FLAT, _CONSTRUCTION, _OBJECT, _NATURE, _SKY, _HUMAN, _VEHICLE = range(len(CLASSES))
_LOOKS: dict[str, Look] = {
    "road": Look(_FLAT, ((0.36, 0.36, 0.38),)),
    "pavement": Look(_FLAT, ((0.6, 0.57, 0.55),), (0.54, 0.51, 0.5), (0.8, 0.8)),
    "paint": Look(_FLAT, ((0.9, 0.9, 0.88),)),
    "house": Look(_CONSTRUCTION, ((0.8, 0.68, 0.52), (0.6, 0.35, 0.28)), (0.22, 0.25, 0.32), (2, 3)),
    "pole": Look(_OBJECT, ((0.5, 0.5, 0.52), (0.3, 0.3, 0.32))),
    "sign": Look(_OBJECT, ((0.15, 0.3, 0.85), (0.95, 0.8, 0.2)), (0.95, 0.95, 0.95), (0.5, 0.5)),
    "grass": Look(_NATURE, ((0.32, 0.48, 0.18),)),
    "trunk": Look(_NATURE, ((0.3, 0.2, 0.12),)),
    "leaves": Look(_NATURE, ((0.2, 0.4, 0.12), (0.3, 0.45, 0.15)), round=True),
    "head": Look(_HUMAN, ((0.87, 0.7, 0.57), (0.5, 0.35, 0.25)), round=True),
    "coat": Look(_HUMAN, ((0.85, 0.4, 0.1), (0.9, 0.8, 0.3), (0.5, 0.2, 0.6))),
    "legs": Look(_HUMAN, ((0.15, 0.17, 0.3),)),
    "body": Look(_VEHICLE, ((0.75, 0.12, 0.12), (0.1, 0.15, 0.45), (0.85, 0.85, 0.85), (0.9, 0.75, 0.1))),
    "cabin": Look(_VEHICLE, ((0.1, 0.13, 0.18),)),
    "wheel": Look(_VEHICLE, ((0.05, 0.05, 0.05),)),
    "light": Look(_VEHICLE, ((0.9, 0.1, 0.1), (1.0, 1.0, 0.8))),
}
_TREE: list[Part] = [("trunk", 0, 0, 0, 0.35, 3, 0.35), ("leaves", 0, 2.3, 0, 3.6, 4, 3.6)]
_SIGN: list[Part] = [("pole", 0, 0, 0, 0.1, 2.6, 0.1), ("sign", 0, 2, 0.07, 0.7, 0.7, 0.04)]
_LAMP: list[Part] = [("pole", 0, 0, 0, 0.15, 6, 0.15), ("pole", 0, 6, 0, 1.6, 0.12, 0.25)]
_PERSON: list[Part] = [
    *(("legs", x, 0, 0, 0.16, 0.8, 0.2) for x in (-0.11, 0.11)),
    ("coat", 0, 0.75, 0, 0.5, 0.7, 0.3),
    ("head", 0, 1.45, 0, 0.24, 0.3, 0.24),
]
_CAR: list[Part] = [
    ("body", 0, 0.3, 0, 1.8, 0.6, 4.2),
    ("cabin", 0, 0.9, 0, 1.6, 0.55, 2.3),
    *(("wheel", x, 0, z, 0.25, 0.62, 0.62) for x in (-0.8, 0.8) for z in (-1.3, 1.3)),
    *(("light", x, 0.6, 0, 0.35, 0.16, 4.24) for x in (-0.65, 0.65)),
]


def draw_street(rng: Rng) -> tuple[list[Solid], Camera]:
    """Build a street that leads away from the camera, which drives in the right lane."""
    road, pavement = rng.uniform((3.6, 2.0), (6.0, 4.0))
    edge, length = road + pavement, 2 * _FAR
    ground: list[Part] = [
        ("grass", 0, -1, 0, 400, 0.95, length),
        ("pavement", 0, -1, 0, 2 * edge, 1, length),
        ("road", 0, -1, 0, 2 * road, 1.02, length),
        *(("paint", 0, 0.01, 4.0 - 6 * dash, 0.14, 0.02, 3) for dash in range(12)),
    ]
    piece = partial(assemble, rng, _LOOKS)
    solids = piece(ground, spread=0)
    for side in (-1, 1):
        near, built, parked = 8.0, rng.uniform(0.5, 0.95), rng.uniform(0, 0.5)
        while near > -_FAR:
            wide, tall = rng.uniform((8, 5), (18, 14))
            if rng.random() < built:
                solids += piece([("house", 0, 0, 0, 7, tall, wide - 1)], (side * (edge + 4.5), near - wide / 2, 0))
            else:
                solids += piece(_TREE, (side * (edge + rng.uniform(2.5, 6)), near - wide / 2, 0))
            near -= wide
        for z in np.arange(-5, -60, -9) - rng.uniform(0, 4):
            solids += piece([_TREE, _SIGN, _LAMP][rng.choice(3, p=(0.3, 0.5, 0.2))], (side * (road + 0.5), z, 0))
        for z in np.arange(-8, -50, -7):
            if rng.random() < parked:
                solids += piece(_CAR, (side * (road - 1), z, 0))
        for _ in range(rng.integers(1, 5)):
            solids += piece(_PERSON, (side * rng.uniform(road, edge), -rng.uniform(6, 30), rng.uniform(0, math.pi)))
        solids += piece(_CAR, (side * 0.35 * road, -8 - rng.exponential(15), 0))
    position = (rng.uniform(0.25, 0.5) * road, rng.uniform(1.25, 1.5), 0.0)
    return solids, Camera(np.array(position), rng.uniform(-0.1, 0.12), rng.uniform(-0.06, 0.02), FOCAL)


def make_street(rng: Rng, height: int, width: int) -> dict[str, np.ndarray]:
    """Folder to array of one example. CityScapes does not know everything either.

    The hood of the camera's car has neither label nor depth. Labels are also missing along the border. Depth is also
    missing along the left edge, in a few spots, and where it is too near. That of the sky is 0.
    """
    frame = render(*draw_street(rng), rng, (height, width), haze=rng.uniform(100, 300))
    down, across = np.indices((height, width)) / np.reshape((height, width), (2, 1, 1))
    is_sky = np.isinf(frame.depth)
    blue = rng.uniform((0.4, 0.6, 0.85), (0.5, 0.7, 0.95))
    frame.image[is_sky] = (0.85 + (blue - 0.85) * (1 - down[..., None]))[is_sky]
    frame.label[is_sky] = _SKY
    is_hood = down > rng.uniform(0.9, 0.95) + 0.25 * (across - 0.5) ** 2
    frame.image[is_hood] = rng.uniform(0.1, 0.25, 3)

    inverse = 1 / frame.depth
    no_depth = is_hood | spots(rng, height, width) | (inverse > _LARGEST)
    no_depth[:, : max(1, width // 32)] = True
    no_label = np.pad(is_hood[1:-1, 1:-1], 1, constant_values=True)
    return {
        "image": photograph(frame.image, rng),
        "label_7": np.where(no_label, -1, frame.label),
        "depth": np.where(no_depth, 0, inverse)[..., None].astype(np.float32),
    }
