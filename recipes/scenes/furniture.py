"""What stands and hangs in the rooms, each drawn at random.

Furniture stands on the floor around its origin, its back at -z and its front towards +z. What hangs has its back at
z = 0 and its middle at the origin.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np

from recipes.scenes.scene import Colour, Material, Part, ball, box, place, tint
from recipes.scenes.textures import Pattern

__all__ = [
    "WOODS",
    "RoomLabel",
    "bed",
    "bookshelf",
    "cabinet",
    "dining",
    "hanging_tv",
    "painting",
    "plant",
    "small_things",
    "sofa",
    "standing_lamp",
    "tv_stand",
    "window",
]

Rng = np.random.Generator
WOODS: tuple[Colour, ...] = ((0.45, 0.28, 0.15), (0.62, 0.43, 0.25), (0.3, 0.18, 0.1))
BRIGHT: tuple[Colour, ...] = ((0.85, 0.25, 0.2), (0.95, 0.75, 0.15), (0.2, 0.65, 0.35), (0.9, 0.45, 0.65))


class RoomLabel(IntEnum):
    """The 13 classes of NYUv2, in the field's order."""

    BED = 0
    BOOKS = 1
    CEILING = 2
    CHAIR = 3
    FLOOR = 4
    FURNITURE = 5
    OBJECTS = 6
    PAINTING = 7
    SOFA = 8
    TABLE = 9
    TV = 10
    WALL = 11
    WINDOW = 12


def _legs(material: Material, width: float, depth: float, height: float, thick: float) -> list[Part]:
    """Four legs under the corners of a rectangle."""
    x, z = (width - thick) / 2, (depth - thick) / 2
    return [box(material, (sx * x, 0, sz * z), (thick, height, thick)) for sx in (-1, 1) for sz in (-1, 1)]


def bed(rng: Rng) -> list[Part]:
    """Mattress, blanket, headboard and pillows; 2.1 m long."""
    width, height = rng.uniform(1.0, 1.8), rng.uniform(0.4, 0.6)
    blanket = Material(
        RoomLabel.BED,
        tint(rng, (0.35, 0.45, 0.75), (0.55, 0.65, 0.9), (0.5, 0.4, 0.7)),
        tint(rng, (0.85, 0.87, 0.95)),
        Pattern(rng.choice([Pattern.PLAIN, Pattern.STRIPES, Pattern.CHECKS])),
        rng.uniform(0.2, 0.4),
    )
    linen = Material(RoomLabel.BED, tint(rng, (0.88, 0.9, 0.95), spread=0.03))
    wood = Material(RoomLabel.BED, tint(rng, *WOODS))
    pillows = [0.0] if width < 1.3 else [-width / 4, width / 4]
    return [
        box(wood, (0, 0, 0), (width, 0.25, 2.1)),
        box(linen, (0, 0.25, 0), (width - 0.06, height - 0.28, 2.04)),
        box(blanket, (0, 0.2, 0.3), (width + 0.04, height - 0.2, 1.52)),
        box(wood, (0, 0, -1.07), (width + 0.1, height + rng.uniform(0.3, 0.6), 0.06)),
        *(ball(linen, (x, height - 0.1, -0.75), (0.55, 0.22, 0.38)) for x in pillows),
    ]


def sofa(rng: Rng) -> list[Part]:
    """Seat, back and arms, with a cushion or two."""
    width, seat, back = rng.uniform(1.5, 2.3), rng.uniform(0.38, 0.46), rng.uniform(0.75, 0.95)
    cloth = Material(
        RoomLabel.SOFA,
        tint(rng, (0.55, 0.15, 0.15), (0.15, 0.4, 0.3), (0.65, 0.3, 0.1)),
        tint(rng, (0.3, 0.12, 0.1)),
        Pattern(rng.choice([Pattern.PLAIN, Pattern.CLOUDS])),
        0.15,
    )
    cushion = Material(RoomLabel.SOFA, tint(rng, (0.9, 0.8, 0.5), cloth.colour))
    side = width / 2 - 0.1
    return [
        box(cloth, (0, 0, 0.05), (width, seat, 0.8)),
        box(cloth, (0, 0, -0.35), (width, back, 0.2)),
        *(box(cloth, (x, 0, 0.05), (0.2, seat + 0.2, 0.85)) for x in (-side, side)),
        *(ball(cushion, (x, seat, -0.15), (0.42, 0.4, 0.22)) for x in (-0.6 * side, 0.6 * side) if rng.random() < 0.6),
    ]


def _chair(rng: Rng, material: Material) -> list[Part]:
    seat, width = rng.uniform(0.42, 0.48), rng.uniform(0.4, 0.48)
    return [
        box(material, (0, seat - 0.05, 0), (width, 0.05, width)),
        box(material, (0, seat, -width / 2 + 0.02), (width, rng.uniform(0.4, 0.55), 0.04)),
        *_legs(material, width, width, seat - 0.05, 0.045),
    ]


def _table(rng: Rng, width: float, depth: float, height: float) -> list[Part]:
    dark = tint(rng, (0.5, 0.3, 0.12), (0.35, 0.2, 0.1), (0.75, 0.6, 0.4))
    top = Material(RoomLabel.TABLE, dark, tint(rng, (0.25, 0.14, 0.07)), Pattern.PLANKS, 0.15)
    return [
        box(top, (0, height - 0.05, 0), (width, 0.05, depth)),
        *_legs(Material(RoomLabel.TABLE, dark), width - 0.1, depth - 0.1, height - 0.05, 0.07),
        *place(small_things(rng, 0.4 * width, 0.35 * depth), 0, height, 0),
    ]


def dining(rng: Rng) -> list[Part]:
    """A table with things on it and up to four chairs around."""
    width, depth, height = rng.uniform(1.0, 1.7), rng.uniform(0.7, 0.95), rng.uniform(0.7, 0.78)
    parts = _table(rng, width, depth, height)
    seats = Material(RoomLabel.CHAIR, tint(rng, (0.85, 0.55, 0.2), (0.95, 0.85, 0.6), (0.75, 0.4, 0.15)))
    around = [(-width / 2 - 0.2, 0, 90), (width / 2 + 0.2, 0, -90), (0, -depth / 2 - 0.2, 0), (0, depth / 2 + 0.2, 180)]
    for x, z, degrees in rng.permutation(around)[: rng.integers(1, 5)].tolist():
        parts += place(_chair(rng, seats), x, 0, z, np.deg2rad(degrees + rng.uniform(-20, 20)))
    return parts


def cabinet(rng: Rng) -> list[Part]:
    """A dresser or a wardrobe with doors; things stand on the low ones."""
    low = rng.random() < 0.5
    width, depth = rng.uniform(0.8, 1.5), rng.uniform(0.4, 0.55)
    height = rng.uniform(0.7, 1.0) if low else rng.uniform(1.7, 2.1)
    colour = tint(rng, *WOODS, (0.82, 0.82, 0.78))
    body = Material(RoomLabel.FURNITURE, colour)
    doors = Material(
        RoomLabel.FURNITURE,
        colour,
        (0.6 * colour[0], 0.6 * colour[1], 0.6 * colour[2]),
        Pattern.PANES,
        rng.uniform(0.35, 0.5),
    )
    middle = box(body, (0, 0, 0), (width, height, depth))
    parts = [Part((body, body, body, body, body, doors), middle.centre, middle.half)]
    return parts + place(small_things(rng, 0.4 * width, 0.3 * depth), 0, height, 0) if low else parts


def bookshelf(rng: Rng) -> list[Part]:
    """Boards with rows of books."""
    width, shelves, depth = rng.uniform(0.7, 1.2), int(rng.integers(3, 6)), 0.3
    wood = Material(RoomLabel.FURNITURE, tint(rng, *WOODS))
    height = 0.34 * shelves
    parts = [
        box(wood, (0, 0, -depth / 2 + 0.01), (width, height, 0.02)),
        *(box(wood, (x, 0, 0), (0.03, height + 0.02, depth)) for x in (-width / 2, width / 2)),
        *(box(wood, (0, 0.34 * shelf, 0), (width, 0.025, depth)) for shelf in range(shelves + 1)),
    ]
    for shelf in range(shelves):
        filled = rng.uniform(0.5, 1.0) * (width - 0.05)
        x = rng.choice([-1, 1]) * (width - 0.05 - filled) / 2
        parts.append(box(_books(rng), (x, 0.34 * shelf + 0.025, 0), (filled, rng.uniform(0.2, 0.29), 0.2)))
    return parts


def _books(rng: Rng) -> Material:
    light, dark = tint(rng, (0.95, 0.85, 0.3), (0.95, 0.6, 0.5)), tint(rng, (0.1, 0.2, 0.55), (0.45, 0.05, 0.3))
    return Material(RoomLabel.BOOKS, light, dark, Pattern.SPINES, rng.uniform(0.035, 0.06))


def _screen(rng: Rng) -> tuple[Material, Material]:
    """Case and glass."""
    case = Material(RoomLabel.TV, tint(rng, (0.06, 0.06, 0.07), spread=0.02))
    picture = tint(rng, (0.1, 0.3, 0.75), (0.1, 0.6, 0.7))
    if rng.random() < 0.5:
        return case, Material(RoomLabel.TV, (0.04, 0.05, 0.08), (0.1, 0.11, 0.14), Pattern.CLOUDS, 0.5, glow=0.3)
    return case, Material(RoomLabel.TV, (0.03, 0.05, 0.15), picture, Pattern.CLOUDS, 0.3, glow=0.8)


def hanging_tv(rng: Rng) -> list[Part]:
    """A flat screen."""
    case, glass = _screen(rng)
    width = rng.uniform(0.8, 1.3)
    height = 0.56 * width
    return [
        Part(case, (0, 0, 0.03), (width / 2 + 0.03, height / 2 + 0.03, 0.03)),
        Part(glass, (0, 0, 0.061), (width / 2, height / 2, 0.003)),
    ]


def tv_stand(rng: Rng) -> list[Part]:
    """A flat screen on a low cabinet."""
    height, width = rng.uniform(0.4, 0.55), rng.uniform(1.1, 1.6)
    wood = Material(RoomLabel.FURNITURE, tint(rng, *WOODS))
    screen = hanging_tv(rng)
    return [box(wood, (0, 0, 0), (width, height, 0.42)), *place(screen, 0, height + 0.05 + screen[0].half[1], -0.1)]


def painting(rng: Rng) -> list[Part]:
    """A canvas in a frame."""
    width, height = rng.uniform(0.4, 1.0), rng.uniform(0.4, 0.8)
    frame = Material(RoomLabel.PAINTING, tint(rng, (0.75, 0.6, 0.2), (0.15, 0.1, 0.08)))
    canvas = Material(
        RoomLabel.PAINTING,
        tint(rng, *BRIGHT),
        tint(rng, (0.1, 0.25, 0.6), (0.1, 0.45, 0.3), (0.4, 0.1, 0.45)),
        Pattern.CLOUDS,
        rng.uniform(0.12, 0.25),
    )
    return [
        Part(frame, (0, 0, 0.015), (width / 2 + 0.04, height / 2 + 0.04, 0.015)),
        Part(canvas, (0, 0, 0.02), (width / 2, height / 2, 0.015)),
    ]


def window(rng: Rng) -> list[Part]:
    """Bright panes in a white frame."""
    width, height = rng.uniform(0.8, 1.6), rng.uniform(0.9, 1.3)
    frame = Material(RoomLabel.WINDOW, tint(rng, (0.9, 0.9, 0.88), spread=0.03))
    outside = Material(RoomLabel.WINDOW, tint(rng, (0.75, 0.9, 1.0)), (1.0, 1.0, 1.0), Pattern.CLOUDS, 0.8, glow=0.95)
    bars = [Part(frame, (0, 0, 0.03), (0.025, height / 2, 0.02)), Part(frame, (0, 0, 0.03), (width / 2, 0.025, 0.02))]
    return [
        Part(frame, (0, 0, 0.015), (width / 2 + 0.06, height / 2 + 0.06, 0.015)),
        Part(outside, (0, 0, 0.02), (width / 2, height / 2, 0.015)),
        *bars,
    ]


def _pile(rng: Rng) -> list[Part]:
    return [
        box(_books(rng), (0, 0.045 * level, 0), (0.26, 0.045, 0.19), rng.uniform(-0.4, 0.4))
        for level in range(rng.integers(2, 5))
    ]


def _toy(rng: Rng) -> list[Part]:
    size, material = rng.uniform(0.12, 0.26), Material(RoomLabel.OBJECTS, tint(rng, *BRIGHT))
    return [ball(material, (0, 0, 0), (size, size * rng.choice([1.0, 1.6]), size))]


def _carton(rng: Rng) -> list[Part]:
    material = Material(RoomLabel.OBJECTS, tint(rng, *BRIGHT))
    return [box(material, (0, 0, 0), tuple(rng.uniform(0.12, 0.3, 3).tolist()), rng.uniform(0, np.pi))]


def small_things(rng: Rng, half_width: float, half_depth: float) -> list[Part]:
    """Up to three piles of books and other objects, on a rectangle around the origin."""
    kinds: list[Callable[[Rng], list[Part]]] = [_pile, _toy, _carton]
    parts: list[Part] = []
    for slot in rng.permutation(3)[: rng.integers(0, 4)]:
        thing = kinds[rng.integers(len(kinds))](rng)
        parts += place(thing, (slot - 1) * 0.8 * half_width, 0, rng.uniform(-1, 1) * half_depth)
    return parts


def plant(rng: Rng) -> list[Part]:
    """Leaves over a pot."""
    pot = Material(RoomLabel.OBJECTS, tint(rng, (0.8, 0.45, 0.3)))
    leaves = Material(RoomLabel.OBJECTS, (0.15, 0.5, 0.15), (0.35, 0.75, 0.25), Pattern.CLOUDS, 0.08)
    height = rng.uniform(0.5, 1.0)
    return [box(pot, (0, 0, 0), (0.28, 0.28, 0.28)), ball(leaves, (0, 0.2, 0), (0.55, height, 0.55))]


def standing_lamp(rng: Rng) -> list[Part]:
    """A shade on a pole."""
    pole = Material(RoomLabel.OBJECTS, (0.2, 0.2, 0.2))
    shade = Material(RoomLabel.OBJECTS, tint(rng, (1.0, 0.9, 0.6)), glow=0.8)
    height = rng.uniform(1.3, 1.6)
    return [
        box(pole, (0, 0, 0), (0.3, 0.03, 0.3)),
        box(pole, (0, 0, 0), (0.035, height, 0.035)),
        ball(shade, (0, height - 0.1, 0), (0.42, 0.34, 0.42)),
    ]
