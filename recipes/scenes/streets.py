"""Streets as seen from a car: seven classes and depth."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from recipes.scenes import traffic
from recipes.scenes.geometry import Camera
from recipes.scenes.scene import Light, Material, Part, Scene, Sky, box, place, tint
from recipes.scenes.textures import Pattern
from recipes.scenes.traffic import StreetLabel

__all__ = ["draw_street"]

Rng = np.random.Generator
# That of CityScapes: 2262 pixels at 2048 columns.
FOCAL = 1.105
_FAR = 110.0
_SUN = 300.0


def draw_street(rng: Rng, height: int, width: int) -> Scene:
    """Draw a street that leads away from the camera.

    Args:
        rng: Decides everything.
        height: Rows of the image.
        width: Columns of the image.
    """
    road, pavement = rng.uniform(3.6, 6.0), rng.uniform(1.8, 4.0)
    camera = Camera(
        # In the right lane.
        position=(rng.uniform(0.25, 0.5) * road, rng.uniform(1.25, 1.5), 0.0),
        yaw=rng.uniform(-0.1, 0.12),
        pitch=rng.uniform(-0.06, 0.02),
        focal=FOCAL,
        height=height,
        width=width,
    )
    parts = list(_ground(rng, road, pavement))
    for side in (-1, 1):
        parts += _beside(rng, side, road + pavement)
        parts += _pavement_things(rng, side, road, pavement)
        parts += _parked(rng, side, road)
    parts += _driving(rng, road)
    parts += _crossing(rng, road)

    clouds = rng.uniform(0, 1)
    around, above = rng.uniform(-math.pi, math.pi), rng.uniform(0.4, 1.1)
    direction = (math.cos(above) * math.sin(around), math.sin(above), math.cos(above) * math.cos(around))
    sun = Light((_SUN * direction[0], _SUN * direction[1], _SUN * direction[2]), _grey(rng, 0.95 - 0.5 * clouds))
    sky = Sky(
        StreetLabel.SKY,
        horizon=tint(rng, (0.82, 0.87, 0.92), spread=0.04),
        zenith=tint(rng, (0.4, 0.6, 0.9)),
        clouds=clouds,
        haze=rng.uniform(150, 400),
        salt=int(rng.integers(1 << 16)),
    )
    return Scene(camera, parts, [sun], _grey(rng, 0.5 + 0.2 * clouds), sky)


def _grey(rng: Rng, level: float) -> tuple[float, float, float]:
    warm = rng.uniform(-0.03, 0.03)
    return level * (1 + warm), level, level * (1 - warm)


def _ground(rng: Rng, road: float, pavement: float) -> Iterator[Part]:
    """Layers on top of each other, and the marks of the lanes."""
    length, middle = 2 * _FAR, -_FAR + 10
    asphalt = Material(
        StreetLabel.FLAT, tint(rng, (0.36, 0.36, 0.38)), tint(rng, (0.3, 0.3, 0.32)), Pattern.CLOUDS, 0.8
    )
    slabs = Material(StreetLabel.FLAT, tint(rng, (0.58, 0.55, 0.53)), (0.45, 0.43, 0.42), Pattern.CHECKS, 0.6)
    paint = Material(StreetLabel.FLAT, (0.9, 0.9, 0.88))
    grass = Material(StreetLabel.NATURE, tint(rng, (0.32, 0.48, 0.18)), (0.22, 0.36, 0.12), Pattern.CLOUDS, 0.7)
    yield box(grass, (0, -1.0, middle), (200, 0.95, length))
    yield box(asphalt, (0, -1.0, middle), (2 * road, 1.0, length))
    for side in (-1, 1):
        yield box(slabs, (side * (road + pavement / 2), -1.0, middle), (pavement, 1.12, length))
        yield box(paint, (side * (road - 0.25), 0, middle), (0.12, 0.006, length))
    start = rng.uniform(0, 6)
    for dash in range(12):
        yield box(paint, (0, 0, 4 - start - 6 * dash), (0.14, 0.006, 3.0))


def _beside(rng: Rng, side: int, edge: float) -> list[Part]:
    """Houses, walls, and gaps with trees."""
    parts: list[Part] = []
    near, built = 8.0, rng.uniform(0.5, 0.95)
    setback = rng.choice([0.0, rng.uniform(1.0, 4.0)])
    while near > -_FAR:
        width = rng.uniform(9, 20)
        z = near - width / 2
        if rng.random() < built:
            depth = rng.uniform(7, 10)
            house = traffic.building(rng, width - rng.choice([0.0, 1.5]), depth)
            parts += place(house, side * (edge + setback + depth / 2), 0, z, -side * math.pi / 2)
        else:
            if rng.random() < 0.5:
                stone = tint(rng, (0.6, 0.55, 0.5))
                fence = Material(StreetLabel.CONSTRUCTION, stone, (0.4, 0.36, 0.33), Pattern.PLANKS, 0.25)
                parts.append(box(fence, (side * (edge + 0.3), 0, z), (0.2, rng.uniform(0.8, 1.8), width)))
            for _ in range(rng.integers(1, 4)):
                plant = traffic.tree(rng) if rng.random() < 0.6 else traffic.bush(rng)
                parts += place(plant, side * (edge + rng.uniform(2.5, 9)), 0, near - rng.uniform(0, width))
        near -= width
    return parts


def _pavement_things(rng: Rng, side: int, road: float, pavement: float) -> list[Part]:
    """Trees, poles and people."""
    parts: list[Part] = []
    curb = side * (road + 0.5)
    planted, z = rng.random() < 0.5, -rng.uniform(4, 12)
    while z > -70:
        chosen = rng.random()
        # Arms of lamps reach over the road, plates and lights look at the camera.
        if planted and chosen < 0.5:
            parts += place(traffic.tree(rng), curb, 0.1, z)
        elif chosen < 0.65:
            parts += place(traffic.lamp_post(rng), curb, 0.1, z, -side * math.pi / 2)
        elif chosen < 0.9:
            parts += place(traffic.traffic_sign(rng), curb, 0.1, z, rng.uniform(-0.3, 0.3))
        else:
            parts += place(traffic.traffic_light(rng), curb, 0.1, z, rng.uniform(-0.2, 0.2))
        z -= rng.uniform(6, 14)
    for _ in range(rng.integers(1, 5)):
        x = side * (road + rng.uniform(0.8, pavement - 0.4))
        parts += place(traffic.person(rng), x, 0.12, -rng.uniform(6, 30), rng.uniform(-math.pi, math.pi))
    return parts


def _parked(rng: Rng, side: int, road: float) -> list[Part]:
    parts: list[Part] = []
    crowded, z = rng.uniform(0, 0.6), -rng.uniform(6, 10)
    while z > -50:
        if rng.random() < crowded:
            parts += place(traffic.car(rng), side * (road - 0.9), 0, z, math.pi * (side > 0) + rng.uniform(-0.04, 0.04))
        z -= rng.uniform(5.5, 7)
    return parts


def _driving(rng: Rng, road: float) -> list[Part]:
    """Those ahead show their tail lights, oncoming ones their head lights."""
    parts: list[Part] = []
    for side, nearest in ((-1, 7), (1, 9)):
        z = -nearest - rng.exponential(15)
        if z > -70:
            parts += place(traffic.car(rng), side * road * rng.uniform(0.28, 0.42), 0, z, math.pi * (side > 0))
    return parts


def _crossing(rng: Rng, road: float) -> list[Part]:
    parts: list[Part] = []
    for _ in range(rng.choice([0, 0, 1, 2])):
        where = rng.uniform(-0.9, 0.9) * road, 0.0, -rng.uniform(6, 20)
        parts += place(traffic.person(rng), *where, rng.choice([-1, 1]) * math.pi / 2)
    return parts
