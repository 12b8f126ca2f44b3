"""What a scene is made of: parts with materials, lights, a sky; and how parts are put together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recipes.scenes.geometry import Camera, Solids
from recipes.scenes.textures import Pattern

__all__ = ["Light", "Material", "Part", "Scene", "Sky", "Surfaces", "ball", "box", "place", "tint"]

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Material:
    """What a surface looks like, and which class it belongs to.

    Args:
        label: Index of the class.
        colour: Red, green and blue in [0, 1].
        accent: The pattern's second colour.
        pattern: Where the accent shows.
        cell: Size of the pattern, in metres.
        glow: Share of its colour that it shows without any light, in [0, 1].
    """

    label: int
    colour: Colour
    accent: Colour = (0.0, 0.0, 0.0)
    pattern: Pattern = Pattern.PLAIN
    cell: float = 1.0
    glow: float = 0.0


@dataclass(frozen=True)
class Part:
    """A box or an ellipsoid.

    Args:
        material: One for all sides, or six, for -x, +x, -y, +y, -z, +z.
        centre: In metres.
        half: Half sizes along its own axes, in metres.
        yaw: Turn to the left about the vertical axis, in radians.
        round: Whether it is an ellipsoid.
        hollow: Whether it is a box seen from inside.
    """

    material: Material | tuple[Material, ...]
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    yaw: float = 0.0
    round: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Light:
    """A point light.

    Args:
        position: In metres.
        colour: Red, green and blue, each the brightness that it gives to a white surface close by.
        reach: Distance at which half of that is left, in metres.
    """

    position: tuple[float, float, float]
    colour: Colour
    reach: float = math.inf


@dataclass(frozen=True)
class Sky:
    """What is seen where nothing is hit, and what far things fade into.

    Args:
        label: Index of the class.
        horizon: Colour there.
        zenith: Colour at 45 degrees and more.
        clouds: How much of it they cover, in [0, 1].
        haze: Distance after which two thirds of a thing's own colour are lost, in metres.
        salt: Makes the clouds.
    """

    label: int
    horizon: Colour
    zenith: Colour
    clouds: float
    haze: float
    salt: int


@dataclass(frozen=True)
class Surfaces:
    """The materials of the sides of N solids; all but `of_side` has one row for each of M materials.

    Args:
        of_side: Index of the material of each side (N, 6).
        label: (M,).
        colour: (M, 3).
        accent: (M, 3).
        pattern: (M,).
        cell: (M,).
        glow: (M,).
    """

    of_side: Tensor
    label: Tensor
    colour: Tensor
    accent: Tensor
    pattern: Tensor
    cell: Tensor
    glow: Tensor


@dataclass(frozen=True)
class Scene:
    """All that decides a picture.

    Args:
        camera: Where it is seen from.
        parts: What there is.
        lights: What casts shadows.
        ambient: Light from everywhere.
        sky: None where walls hide it.
    """

    camera: Camera
    parts: Sequence[Part]
    lights: Sequence[Light]
    ambient: Colour
    sky: Sky | None = None

    def solids(self) -> Solids:
        """The shapes of the parts."""
        return Solids(
            centre=_floats([part.centre for part in self.parts]),
            half=_floats([part.half for part in self.parts]),
            yaw=_floats([part.yaw for part in self.parts]),
            round=torch.tensor([part.round for part in self.parts]),
            hollow=torch.tensor([part.hollow for part in self.parts]),
        )

    def surfaces(self) -> Surfaces:
        """The materials of the parts."""
        sides = [part.material if isinstance(part.material, tuple) else (part.material,) * 6 for part in self.parts]
        rows = {material: row for row, material in enumerate(dict.fromkeys(side for six in sides for side in six))}
        return Surfaces(
            of_side=torch.tensor([[rows[side] for side in six] for six in sides]),
            label=torch.tensor([material.label for material in rows]),
            colour=_floats([material.colour for material in rows]),
            accent=_floats([material.accent for material in rows]),
            pattern=torch.tensor([int(material.pattern) for material in rows]),
            cell=_floats([material.cell for material in rows]),
            glow=_floats([material.glow for material in rows]),
        )


def box(material: Material, low: tuple[float, float, float], size: tuple[float, float, float], yaw: float = 0) -> Part:
    """A box on top of a point, its middle above it."""
    x, y, z = low
    half = (size[0] / 2, size[1] / 2, size[2] / 2)
    return Part(material, (x, y + half[1], z), half, yaw)


def ball(material: Material, low: tuple[float, float, float], size: tuple[float, float, float]) -> Part:
    """An ellipsoid on top of a point."""
    x, y, z = low
    return Part(material, (x, y + size[1] / 2, z), (size[0] / 2, size[1] / 2, size[2] / 2), round=True)


def place(parts: Iterable[Part], x: float, y: float, z: float, yaw: float = 0.0) -> list[Part]:
    """Turn parts about the vertical axis through their origin, and move that origin to a point."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    return [
        replace(
            part,
            centre=(
                x + cos * part.centre[0] + sin * part.centre[2],
                y + part.centre[1],
                z + cos * part.centre[2] - sin * part.centre[0],
            ),
            yaw=part.yaw + yaw,
        )
        for part in parts
    ]


def tint(rng: np.random.Generator, *colours: Colour, spread: float = 0.06) -> Colour:
    """One of the colours, changed a little at random."""
    colour = colours[rng.integers(len(colours))] + rng.uniform(-spread, spread, 3)
    red, green, blue = np.clip(colour, 0.0, 1.0).tolist()
    return red, green, blue


def _floats(numbers: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    # The type is named because NumPy's scalars among the numbers would make it double.
    return torch.tensor(numbers, dtype=torch.float32)
