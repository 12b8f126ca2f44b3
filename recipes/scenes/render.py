"""Boxes and ellipsoids, and a ray caster that knows the class, depth and normal of every pixel.

World and camera axes are right-handed: x to the right, y up, z toward the viewer. Lengths are in meters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Camera", "Color", "Frame", "Look", "Part", "Rng", "Solid", "assemble", "photograph", "render", "spots"]

Rng = np.random.Generator
Color = tuple[float, float, float]
Part = tuple[str, float, float, float, float, float, float]
"""Name of its look; x, y and z of the middle of its underside; width, height and depth."""
Place = tuple[float, float, float]
"""X, z, and turn to the left in radians."""


@dataclass(frozen=True)
class Look:
    """What a surface looks like, and its class.

    Args:
        label: Index of the class.
        colors: Red, green and blue in [0, 1]. Each piece takes one of them.
        accent: Color of the rectangles that are drawn on it.
        cell: Width and height of the cells in which the rectangles lie; infinite for stripes. None: no rectangles.
        round: Whether parts with this look are ellipsoids and not boxes.
    """

    label: int
    colors: tuple[Color, ...]
    accent: Color = (0.0, 0.0, 0.0)
    cell: tuple[float, float] | None = None
    round: bool = False


@dataclass(frozen=True)
class Solid:
    """A box or an ellipsoid: its look, main color, center, half sizes, and turn to the left in radians."""

    look: Look
    color: np.ndarray
    center: np.ndarray
    half: np.ndarray
    turn: float = 0.0

    def distances(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Lengths of each ray (3, P) up to the solid (P,); infinite where the ray misses it."""
        # In these coordinates, the solid is a cube of side 2 or a unit sphere.
        to_unit = _rotation(self.turn).T / self.half[:, None]
        start, way = to_unit @ (origin - self.center), _apply(to_unit, rays)
        if self.look.round:
            square, along = (way**2).sum(axis=0), (start[:, None] * way).sum(axis=0)
            root = along**2 - square * (start @ start - 1)
            entry, is_hit = (-along - np.sqrt(root.clip(0))) / square, root > 0
        else:
            # No division by zero: a ray along a side gets a large but finite value.
            inverse = 1 / (way + 1e-12)
            middle, reach = -start[:, None] * inverse, np.abs(inverse)
            entry = (middle - reach).max(axis=0)
            is_hit = entry < (middle + reach).min(axis=0)
        return np.where(is_hit & (entry > 0), entry, np.inf)

    def surface(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World normals and colors, both (3, P), at points on the surface (3, P)."""
        rotation, half = _rotation(self.turn), self.half[:, None]
        local = _apply(rotation.T, points - self.center[:, None])
        axis = np.abs(local / half).argmax(axis=0)
        normal = local / half**2 if self.look.round else (np.arange(3)[:, None] == axis) * np.sign(local)
        color = np.broadcast_to(self.color[:, None], points.shape)
        if self.look.cell:
            across, up = np.where(axis == 0, local[2], local[0]), np.where(axis == 1, local[2], local[1])
            cells = np.stack([across, up]) / np.reshape(self.look.cell, (2, 1))
            in_rectangle = (np.abs(cells - np.rint(cells)) < 0.35).all(axis=0)
            color = np.where(in_rectangle, np.reshape(self.look.accent, (3, 1)), color)
        return _apply(rotation, normal / np.linalg.norm(normal, axis=0)), color


class Camera(NamedTuple):
    """A pinhole camera: where it is, its turns to the left and upward, and its focal length in widths of the image."""

    position: np.ndarray
    yaw: float
    pitch: float
    focal: float


class Frame(NamedTuple):
    """A picture (H, W, 3), and its label (H, W), depth (H, W) and normal (H, W, 3) in camera axes.

    Where nothing is hit, the label is -1 and the depth infinite.
    """

    image: np.ndarray
    label: np.ndarray
    depth: np.ndarray
    normal: np.ndarray


def render(solids: Iterable[Solid], camera: Camera, rng: Rng, size: tuple[int, int], haze: float) -> Frame:
    """Draw rows and columns of what a camera sees in light from a random direction; colors fade over `haze` meters."""
    (height, width), rotation = size, _rotation(camera.yaw, camera.pitch)
    across = (np.arange(width) + 0.5 - width / 2) / (camera.focal * width)
    up = (height / 2 - 0.5 - np.arange(height)) / (camera.focal * width)
    # Of such a length that the distance along a ray is the depth.
    rays = _apply(rotation, np.stack([*np.meshgrid(across, up), np.full(size, -1.0)]).reshape(3, -1))
    image, normal = np.zeros_like(rays), np.zeros_like(rays)
    depth, label = np.full(rays.shape[1], np.inf), np.full(rays.shape[1], -1)
    for solid in solids:
        distances = solid.distances(camera.position, rays)
        seen = np.flatnonzero(distances < depth)
        depth[seen], label[seen] = distances[seen], solid.look.label
        points = camera.position[:, None] + depth[seen] * rays[:, seen]
        normal[:, seen], image[:, seen] = solid.surface(points)

    sun = np.array([rng.uniform(-0.7, 0.7), 0.7, rng.uniform(0.2, 0.7)])
    bright = (sun[:, None] * normal).sum(axis=0).clip(0) / np.linalg.norm(sun)
    ambient, white = rng.uniform(0.45, 0.65), rng.uniform(0.94, 1.06, (3, 1))
    image *= white * (ambient + 0.6 * bright)
    image += (0.7 - image) * (1 - np.exp(-depth / haze))
    normal = _apply(rotation.T, normal)
    return Frame(image.T.reshape(*size, 3), label.reshape(size), depth.reshape(size), normal.T.reshape(*size, 3))


def assemble(
    rng: Rng, looks: Mapping[str, Look], parts: Sequence[Part], place: Place = (0, 0, 0), spread: float = 0.12
) -> list[Solid]:
    """Build a piece at some place out of its parts; its colors and, by up to `spread`, its sizes are random."""
    scale, rotation = rng.uniform(1 - spread, 1 + spread, 3), _rotation(place[2])
    colors = {name: rng.choice(looks[name].colors) + rng.uniform(-0.06, 0.06, 3) for name, *_ in parts}
    solids = []
    for name, *numbers in parts:
        (x, y, z), size = scale * numbers[:3], scale * numbers[3:]
        center = rotation @ (x, y + size[1] / 2, z) + (place[0], 0, place[1])
        solids.append(Solid(looks[name], colors[name].clip(0, 1), center, size / 2, place[2]))
    return solids


def photograph(image: np.ndarray, rng: Rng) -> np.ndarray:
    """Add noise to a picture, and round it to 8 bits: float32 (H, W, 3) in [0, 1]."""
    noisy = image + rng.uniform(0.005, 0.02) * rng.standard_normal(image.shape)
    return (np.rint(255 * noisy.clip(0, 1)) / 255).astype(np.float32)


def spots(rng: Rng, height: int, width: int) -> np.ndarray:
    """A mask (H, W) of some small ellipses, and of the pixels along the border."""
    down, across = np.indices((height, width))
    mask = np.minimum(np.minimum(down, height - 1 - down), np.minimum(across, width - 1 - across)) < max(1, width // 64)
    for _ in range(rng.integers(2, 5)):
        row, column, tall, wide = rng.uniform((0, 0, 0.01, 0.01), (1, 1, 0.08, 0.08)) * (height, width, height, height)
        mask |= ((down - row) / tall) ** 2 + ((across - column) / wide) ** 2 < 1
    return mask


def _rotation(turn: float, pitch: float = 0.0) -> np.ndarray:
    """Upward, then to the left (3, 3)."""
    cos, sin = np.cos([turn, pitch]), np.sin([turn, pitch])
    to_left = np.array([[cos[0], 0, sin[0]], [0, 1, 0], [-sin[0], 0, cos[0]]])
    return to_left @ np.array([[1, 0, 0], [0, cos[1], -sin[1]], [0, sin[1], cos[1]]])


def _apply(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    # Not `@`, which would start threads beside the processes that draw.
    return np.einsum("ij,jp->ip", matrix, vectors)
