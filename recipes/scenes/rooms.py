"""Furnished rooms: 13 classes, metric depth and surface normals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from recipes.scenes import furniture
from recipes.scenes.furniture import WOODS, RoomLabel
from recipes.scenes.geometry import Camera
from recipes.scenes.scene import Light, Material, Part, Scene, place, tint
from recipes.scenes.textures import Pattern

__all__ = ["draw_room"]

Rng = np.random.Generator
Item = Callable[[Rng], list[Part]]
# The colour camera of the Kinect: 518.9 pixels at 640 columns.
FOCAL = 0.81
_TRIES = 12
# Of the camera to whatever stands on the floor, along z.
_CLEAR = 1.0


@dataclass
class _Room:
    """What stands where, while a room is being furnished; its middle is the origin."""

    rng: Rng
    half_width: float
    half_length: float
    height: float
    camera_z: float
    parts: list[Part] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)
    hung: list[tuple[int, float, float]] = field(default_factory=list)

    def stand(self, item: Item, wall: bool) -> None:
        """Put a thing on the floor where nothing else is, its back to a wall or anywhere; if it finds no place, not."""
        parts, rng = item(self.rng), self.rng
        for _ in range(_TRIES):
            yaw = rng.integers(-1, 2) * math.pi / 2 if wall else rng.uniform(-math.pi, math.pi)
            low_x, high_x, low_z, high_z = _extent(place(parts, 0, 0, 0, yaw))
            free_x = (-self.half_width - low_x, self.half_width - high_x)
            free_z = (-self.half_length - low_z, self.camera_z - _CLEAR - high_z)
            if free_x[0] > free_x[1] or free_z[0] > free_z[1]:
                continue
            x, z = rng.uniform(*free_x), rng.uniform(*free_z)
            if wall:
                x, z = (x, free_z[0]) if yaw == 0 else (free_x[0] if yaw > 0 else free_x[1], z)
            place_taken = (x + low_x, x + high_x, z + low_z, z + high_z)
            if not any(_overlap(place_taken, other) for other in self.taken):
                self.taken.append(place_taken)
                self.parts += place(parts, x, 0, z, yaw)
                return

    def hang(self, item: Item, low: float, high: float) -> None:
        """Put a thing on one of the walls in front of the camera, its middle between two heights."""
        parts, rng = item(self.rng), self.rng
        reach = max(part.half[0] for part in parts) + 0.1
        for _ in range(_TRIES):
            side = int(rng.integers(-1, 2))
            if side == 0:
                along = rng.uniform(-1, 1) * (self.half_width - reach)
                where = (along, -self.half_length)
            else:
                along = rng.uniform(-self.half_length + reach, self.camera_z - _CLEAR)
                where = (-side * self.half_width, along)
            if all(wall != side or abs(along - other) > reach + width for wall, other, width in self.hung):
                self.hung.append((side, along, reach))
                self.parts += place(parts, where[0], rng.uniform(low, high), where[1], side * math.pi / 2)
                return


def draw_room(rng: Rng, height: int, width: int) -> Scene:
    """Draw a furnished room, seen from its near end.

    Args:
        rng: Decides everything.
        height: Rows of the image.
        width: Columns of the image.
    """
    half_width, half_length, ceiling = rng.uniform(1.5, 2.4), rng.uniform(1.7, 2.8), rng.uniform(2.3, 2.8)
    camera = Camera(
        position=(rng.uniform(-0.4, 0.4) * half_width, rng.uniform(1.2, 1.7), half_length - rng.uniform(0.1, 0.4)),
        yaw=rng.uniform(-0.5, 0.5),
        pitch=rng.uniform(-0.3, 0.0),
        focal=FOCAL,
        height=height,
        width=width,
    )
    room = _Room(rng, half_width, half_length, ceiling, camera.position[2])
    for item, wall, chance in _stand_by():
        if rng.random() < chance:
            room.stand(item, wall)
    for item, low, high, count in _wall_by():
        for _ in range(rng.integers(count + 1)):
            room.hang(item, low, high)

    warm = rng.uniform(-0.06, 0.06)
    power = rng.uniform(0.65, 1.0)
    lamp = Light(
        (rng.uniform(-0.5, 0.5) * half_width, ceiling - 0.15, rng.uniform(-0.6, 0.6) * half_length),
        (power * (1 + warm), power, power * (1 - warm)),
        reach=rng.uniform(2.5, 4.5),
    )
    ambient = rng.uniform(0.5, 0.65)
    tinted = (ambient * (1 - warm / 2), ambient, ambient * (1 + warm / 2))
    return Scene(camera, [_shell(rng, half_width, half_length, ceiling), *room.parts], [lamp], tinted)


def _stand_by() -> Sequence[tuple[Item, bool, float]]:
    """Thing, whether its back is to a wall, and how often there is one; large things find their place first."""
    return [
        (furniture.bed, True, 0.45),
        (furniture.sofa, True, 0.75),
        (furniture.dining, False, 0.7),
        (furniture.bookshelf, True, 0.7),
        (furniture.tv_stand, True, 0.6),
        (furniture.cabinet, True, 0.75),
        (furniture.cabinet, True, 0.4),
        (furniture.plant, False, 0.5),
        (furniture.standing_lamp, True, 0.4),
        (_on_floor, False, 0.6),
        (_on_floor, False, 0.4),
    ]


def _wall_by() -> Sequence[tuple[Item, float, float, int]]:
    """Thing, lowest and highest height of its middle, and how many at most."""
    return [
        (furniture.window, 1.4, 1.7, 2),
        (furniture.hanging_tv, 1.2, 1.6, 1),
        (furniture.painting, 1.4, 1.8, 3),
    ]


def _on_floor(rng: Rng) -> list[Part]:
    while True:
        if things := furniture.small_things(rng, 0.5, 0.2):
            return things


def _shell(rng: Rng, half_width: float, half_length: float, height: float) -> Part:
    wall = Material(
        RoomLabel.WALL,
        tint(rng, (0.82, 0.78, 0.68), (0.7, 0.78, 0.72), (0.8, 0.72, 0.7), (0.72, 0.76, 0.82)),
        tint(rng, (0.75, 0.72, 0.65)),
        Pattern(rng.choice([Pattern.PLAIN, Pattern.CLOUDS, Pattern.STRIPES], p=[0.5, 0.3, 0.2])),
        rng.uniform(0.15, 0.5),
    )
    floors = {
        Pattern.PLANKS: (tint(rng, *WOODS), tint(rng, (0.3, 0.2, 0.12)), 0.12),
        Pattern.CHECKS: (tint(rng, (0.6, 0.58, 0.55)), tint(rng, (0.42, 0.4, 0.4)), 0.4),
        Pattern.CLOUDS: (tint(rng, (0.5, 0.42, 0.35), (0.45, 0.45, 0.42)), tint(rng, (0.35, 0.3, 0.26)), 0.2),
    }
    pattern = rng.choice(list(floors), p=[0.5, 0.25, 0.25])
    colour, accent, cell = floors[pattern]
    floor = Material(RoomLabel.FLOOR, colour, accent, Pattern(pattern), cell)
    ceiling = Material(RoomLabel.CEILING, tint(rng, (0.93, 0.93, 0.9), spread=0.04))
    return Part(
        (wall, wall, floor, ceiling, wall, wall),
        (0.0, height / 2, 0.0),
        (half_width, height / 2, half_length),
        hollow=True,
    )


def _extent(parts: Sequence[Part]) -> tuple[float, float, float, float]:
    """Lowest and highest x and z."""
    lows, highs = [], []
    for part in parts:
        cos, sin = abs(math.cos(part.yaw)), abs(math.sin(part.yaw))
        reach = np.array([cos * part.half[0] + sin * part.half[2], sin * part.half[0] + cos * part.half[2]])
        middle = np.array([part.centre[0], part.centre[2]])
        lows.append(middle - reach)
        highs.append(middle + reach)
    (low_x, low_z), (high_x, high_z) = np.min(lows, axis=0).tolist(), np.max(highs, axis=0).tolist()
    return low_x, high_x, low_z, high_z


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
