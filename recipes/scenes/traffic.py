"""What stands and moves in the streets, each drawn at random; on the ground around its origin, its front towards +z."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from recipes.scenes.scene import Colour, Material, Part, ball, box, tint
from recipes.scenes.textures import Pattern

__all__ = ["StreetLabel", "building", "bush", "car", "lamp_post", "person", "traffic_light", "traffic_sign", "tree"]

Rng = np.random.Generator
LACQUERS: tuple[Colour, ...] = (
    (0.7, 0.1, 0.1),
    (0.1, 0.2, 0.6),
    (0.85, 0.85, 0.87),
    (0.12, 0.12, 0.14),
    (0.5, 0.52, 0.55),
    (0.9, 0.7, 0.1),
)


class StreetLabel(IntEnum):
    """The seven categories of CityScapes, in its order; its eighth one, void, is -1."""

    FLAT = 0
    CONSTRUCTION = 1
    OBJECT = 2
    NATURE = 3
    SKY = 4
    HUMAN = 5
    VEHICLE = 6


def building(rng: Rng, width: float, depth: float) -> list[Part]:
    """A house with rows of windows, `width` along the street; at times with a flat roof that juts out."""
    height = 3.0 * rng.integers(2, 7) + 0.6
    wall = tint(rng, (0.65, 0.5, 0.4), (0.6, 0.58, 0.55), (0.75, 0.68, 0.52), (0.55, 0.35, 0.3))
    glass = tint(rng, (0.25, 0.28, 0.33), (0.8, 0.82, 0.85))
    front = Material(StreetLabel.CONSTRUCTION, wall, glass, Pattern.PANES, rng.uniform(2.2, 3.2))
    parts = [box(front, (0, 0, 0), (width, height, depth))]
    if rng.random() < 0.5:
        roof = Material(StreetLabel.CONSTRUCTION, tint(rng, (0.35, 0.22, 0.2), (0.3, 0.3, 0.32)))
        parts.append(box(roof, (0, height, 0), (width + 0.8, 0.5, depth + 0.8)))
    return parts


def tree(rng: Rng) -> list[Part]:
    """A trunk and two round masses of leaves."""
    bark = Material(StreetLabel.NATURE, tint(rng, (0.32, 0.24, 0.17)))
    leaves = _leaves(rng)
    trunk, size = rng.uniform(1.8, 3.0), rng.uniform(2.4, 4.2)
    shift = rng.uniform(-0.6, 0.6, 2).tolist()
    return [
        box(bark, (0, 0, 0), (0.3, trunk + 0.6, 0.3)),
        ball(leaves, (0, trunk, 0), (size, rng.uniform(0.9, 1.4) * size, size)),
        ball(leaves, (shift[0], trunk + 0.4 * size, shift[1]), (0.8 * size, 0.9 * size, 0.8 * size)),
    ]


def bush(rng: Rng) -> list[Part]:
    """A low round mass of leaves."""
    return [ball(_leaves(rng), (0, -0.3, 0), (rng.uniform(1.2, 2.4), rng.uniform(1.2, 2.0), rng.uniform(1.2, 2.4)))]


def _leaves(rng: Rng) -> Material:
    green = tint(rng, (0.16, 0.4, 0.12), (0.28, 0.46, 0.14))
    return Material(StreetLabel.NATURE, green, tint(rng, (0.1, 0.24, 0.08)), Pattern.CLOUDS, 0.5)


def lamp_post(rng: Rng) -> list[Part]:
    """A tall pole with an arm towards +z."""
    steel = Material(StreetLabel.OBJECT, tint(rng, (0.45, 0.47, 0.48)))
    height = rng.uniform(5.0, 7.0)
    return [box(steel, (0, 0, 0), (0.16, height, 0.16)), box(steel, (0, height, 0.6), (0.16, 0.14, 1.4))]


def traffic_sign(rng: Rng) -> list[Part]:
    """A bright plate on a pole."""
    steel = Material(StreetLabel.OBJECT, (0.5, 0.5, 0.5))
    plate = Material(StreetLabel.OBJECT, tint(rng, (0.85, 0.15, 0.1), (0.95, 0.8, 0.1), (0.1, 0.3, 0.8)), glow=0.3)
    height = rng.uniform(2.0, 2.6)
    size = rng.uniform(0.6, 0.9)
    return [box(steel, (0, 0, 0), (0.09, height, 0.09)), box(plate, (0, height, 0.02), (size, size, 0.05))]


def traffic_light(rng: Rng) -> list[Part]:
    """A dark case on a pole, one of its lights on."""
    steel = Material(StreetLabel.OBJECT, (0.3, 0.32, 0.3))
    case = Material(StreetLabel.OBJECT, (0.07, 0.08, 0.07))
    level = int(rng.integers(3))
    shine = Material(StreetLabel.OBJECT, ((0.1, 0.9, 0.35), (1.0, 0.7, 0.1), (1.0, 0.15, 0.1))[level], glow=1.0)
    return [
        box(steel, (0, 0, 0), (0.14, 2.6, 0.14)),
        box(case, (0, 2.6, 0), (0.4, 1.0, 0.3)),
        ball(shine, (0, 2.63 + 0.32 * level, 0.13), (0.26, 0.26, 0.1)),
    ]


def person(rng: Rng) -> list[Part]:
    """Legs, body, arms and head."""
    size = rng.uniform(0.9, 1.08)
    clothes = tint(rng, (0.85, 0.3, 0.5), (0.9, 0.45, 0.15), (0.6, 0.25, 0.7), (0.95, 0.9, 0.4))
    shirt = Material(StreetLabel.HUMAN, clothes)
    trousers = Material(StreetLabel.HUMAN, tint(rng, (0.15, 0.15, 0.35), (0.3, 0.22, 0.15)))
    skin = Material(StreetLabel.HUMAN, tint(rng, (0.9, 0.7, 0.55), (0.5, 0.35, 0.25)))
    step = rng.uniform(0.0, 0.2)
    parts = [
        box(trousers, (-0.1, 0, step), (0.16, 0.85, 0.18)),
        box(trousers, (0.1, 0, -step), (0.16, 0.85, 0.18)),
        ball(shirt, (0, 0.75, 0), (0.5, 0.75, 0.34)),
        *(box(shirt, (x, 0.8, 0), (0.12, 0.6, 0.14)) for x in (-0.27, 0.27)),
        ball(skin, (0, 1.45, 0), (0.24, 0.3, 0.26)),
    ]
    return [
        Part(part.material, _times(size, part.centre), _times(size, part.half), part.yaw, part.round) for part in parts
    ]


def _times(size: float, vector: tuple[float, float, float]) -> tuple[float, float, float]:
    return size * vector[0], size * vector[1], size * vector[2]


def car(rng: Rng) -> list[Part]:
    """Body, cabin, wheels, head lights and tail lights; at times as tall as a van."""
    lacquer = Material(StreetLabel.VEHICLE, tint(rng, *LACQUERS))
    glass = Material(StreetLabel.VEHICLE, (0.12, 0.15, 0.2), lacquer.colour, Pattern.STRIPES, 8.0)
    rubber = Material(StreetLabel.VEHICLE, (0.05, 0.05, 0.05))
    front = Material(StreetLabel.VEHICLE, (1.0, 1.0, 0.9), glow=0.8)
    rear = Material(StreetLabel.VEHICLE, (0.9, 0.05, 0.05), glow=0.7)
    van = rng.random() < 0.25
    width, length = rng.uniform(1.7, 1.9), rng.uniform(4.0, 4.8)
    body, cabin = (1.1, 0.85) if van else (rng.uniform(0.55, 0.65), rng.uniform(0.5, 0.6))
    cabin_length = rng.uniform(0.8, 0.9) * length if van else rng.uniform(0.45, 0.6) * length
    return [
        box(lacquer, (0, 0.25, 0), (width, body, length)),
        box(glass, (0, 0.25 + body, -0.05 * length), (0.88 * width, cabin, cabin_length)),
        box(lacquer, (0, 0.25 + body + cabin, -0.05 * length), (0.88 * width, 0.06, cabin_length)),
        *(
            ball(rubber, (sx * 0.45 * width, 0, sz * 0.31 * length), (0.25, 0.64, 0.64))
            for sx in (-1, 1)
            for sz in (-1, 1)
        ),
        *(
            box(light, (sx * 0.36 * width, 0.25 + 0.55 * body, sz * length / 2), (0.3, 0.16, 0.06))
            for sx in (-1, 1)
            for light, sz in ((front, 1), (rear, -1))
        ),
    ]
