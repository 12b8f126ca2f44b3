"""Boxes and ellipsoids, and what the rays of a camera hit first.

World and camera coordinates are right-handed with x to the right, y up and z towards the viewer: a camera that is not
turned looks along -z. A solid is a cube of side 2 or a unit sphere that was scaled, turned about the vertical axis and
moved, so that one change of coordinates serves both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Camera", "Hits", "Solids", "cast", "is_lit"]

# Of the distance to the light or of a ray parameter: far below a millimetre in any scene.
_NEAR = 1e-4


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Args:
        position: World coordinates, in metres.
        yaw: Turn to the left about the vertical axis, in radians.
        pitch: Turn upwards, in radians.
        focal: Focal length, in widths of the image.
        height: Rows of the image.
        width: Columns of the image.
    """

    position: tuple[float, float, float]
    yaw: float
    pitch: float
    focal: float
    height: int
    width: int

    def axes(self) -> Tensor:
        """World coordinates of the camera's axes right, up and backward, one a row (3, 3)."""
        cos_yaw, sin_yaw = math.cos(self.yaw), math.sin(self.yaw)
        cos_pitch, sin_pitch = math.cos(self.pitch), math.sin(self.pitch)
        return torch.tensor(
            [
                [cos_yaw, 0.0, -sin_yaw],
                [sin_yaw * sin_pitch, cos_pitch, cos_yaw * sin_pitch],
                [sin_yaw * cos_pitch, -sin_pitch, cos_yaw * cos_pitch],
            ]
        )

    def rays(self) -> Tensor:
        """World directions through the centres of the pixels (3, H, W), so long that distance is depth."""
        focal = self.focal * self.width
        right = (torch.arange(self.width) + 0.5 - self.width / 2) / focal
        up = (self.height / 2 - 0.5 - torch.arange(self.height)) / focal
        ups, rights = torch.meshgrid(up, right, indexing="ij")
        in_camera = torch.stack([rights, ups, torch.full_like(ups, -1.0)])
        return (self.axes().T @ in_camera.flatten(1)).view_as(in_camera)


@dataclass(frozen=True)
class Solids:
    """N boxes and ellipsoids.

    Args:
        centre: World coordinates (N, 3), in metres.
        half: Half sizes along the solid's own axes (N, 3), in metres.
        yaw: Turns about the vertical axis (N,), in radians.
        round: Which are ellipsoids (N,).
        hollow: Which are boxes seen from inside, as rooms are (N,).
    """

    centre: Tensor
    half: Tensor
    yaw: Tensor
    round: Tensor
    hollow: Tensor

    def __getitem__(self, index: Tensor) -> Solids:
        return Solids(self.centre[index], self.half[index], self.yaw[index], self.round[index], self.hollow[index])

    def in_cone(self, apex: Tensor, directions: Tensor) -> Tensor:
        """Indices of the solids that rays from one point may meet, and maybe of some that they miss.

        Args:
            apex: World coordinates of the point (3,).
            directions: World directions (3, P), of any length.
        """
        unit = torch.nn.functional.normalize(directions, dim=0)
        axis = torch.nn.functional.normalize(unit.mean(dim=1), dim=0)
        spread = _angle((axis @ unit).min())
        radius = torch.where(self.round, self.half.amax(dim=1), self.half.norm(dim=1))
        towards = self.centre - apex
        distance = towards.norm(dim=1)
        seen_as = (radius / distance).clamp(max=1).asin()
        # A hundredth of a radian for rounding.
        met = (distance <= radius) | (_angle(towards @ axis / distance) <= spread + seen_as + 0.01)
        return met.nonzero()[:, 0]

    def unit_rays(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Rays from world coordinates to those in which each solid is the cube of side 2 or the unit sphere.

        Args:
            origins: (3, P), or (3, 1) if all rays begin in one point.
            directions: (3, P).

        Returns:
            Origins and directions, (3, N, P) or (3, N, 1).
        """
        return self._to_unit(origins[:, None] - self.centre.T[:, :, None]), self._to_unit(directions[:, None])

    def _to_unit(self, vectors: Tensor) -> Tensor:
        # Written into one result: time goes by the memory that is touched.
        scale = self.half.T[:, :, None].reciprocal()
        cos, sin = self.yaw.cos()[:, None], self.yaw.sin()[:, None]
        x, y, z = vectors
        turned = vectors.new_empty(3, len(self.yaw), vectors.shape[2])
        torch.mul(cos * scale[0], x, out=turned[0]).addcmul_(-sin * scale[0], z)
        torch.mul(scale[1], y, out=turned[1])
        torch.mul(sin * scale[2], x, out=turned[2]).addcmul_(cos * scale[2], z)
        return turned


@dataclass(frozen=True)
class Hits:
    """What P rays hit first.

    Args:
        solid: Index of the solid (P,), -1 where there is none.
        distance: In lengths of the ray's direction (P,); infinite where there is none. Depth, for a camera's rays.
        point: World coordinates (P, 3).
        normal: Unit vectors towards where the ray comes from, in world coordinates (P, 3).
        face: Which side of a box it is, -x, +x, -y, +y, -z, +z (P,); of an ellipsoid the side it is nearest to.
        surface: Coordinates on that side in metres, from its middle (2, P): the second one is vertical on walls.
    """

    solid: Tensor
    distance: Tensor
    point: Tensor
    normal: Tensor
    face: Tensor
    surface: Tensor


def cast(origin: Tensor, directions: Tensor, solids: Solids) -> Hits:
    """Find what each ray hits first.

    Args:
        origin: World coordinates from which all rays begin (3,).
        directions: World directions (3, P).
        solids: What there is to hit.

    Returns:
        The hits; where a ray hits nothing, all but `solid` and `distance` is meaningless.
    """
    near = solids.in_cone(origin, directions)
    origin = origin[:, None]
    if len(near):
        distance, nearest = _distances(origin, directions, solids[near]).min(dim=0)
        solid = near[nearest]
    else:
        distance = directions.new_full((directions.shape[1],), math.inf)
        solid = torch.zeros_like(distance, dtype=torch.long)
    missed = distance.isinf()
    ray = torch.where(missed, 0.0, distance) * directions
    point = origin + ray

    hit = solids[solid]
    cos, sin = hit.yaw.cos(), hit.yaw.sin()
    x, y, z = point - hit.centre.T
    local = torch.stack([cos * x - sin * z, y, sin * x + cos * z])
    unit = local / hit.half.T
    axis = unit.abs().argmax(dim=0)
    sign = unit.gather(0, axis[None])[0].sign()

    of_box = torch.zeros_like(local).scatter_(0, axis[None], sign[None])
    of_box = torch.where(hit.hollow, -of_box, of_box)
    normal = torch.nn.functional.normalize(torch.where(hit.round, unit / hit.half.T, of_box), dim=0)
    normal = torch.stack([cos * normal[0] + sin * normal[2], normal[1], cos * normal[2] - sin * normal[0]])
    # On a side across x lie (z, y), across y (x, z), across z (x, y).
    first = torch.where(axis == 0, local[2], local[0])
    second = torch.where(axis == 1, local[2], local[1])
    return Hits(
        solid=torch.where(missed, -1, solid),
        distance=distance,
        point=point.T,
        normal=normal.T,
        face=2 * axis + (sign > 0),
        surface=torch.stack([first, second]),
    )


def is_lit(points: Tensor, light: Tensor, solids: Solids) -> Tensor:
    """Whether no solid stands between points and a light; hollow ones do not count, for the light is inside.

    Args:
        points: World coordinates (P, 3), slightly off their surfaces.
        light: World coordinates (3,).
        solids: What may stand between.
    """
    if not len(points):
        return torch.ones(0, dtype=torch.bool)
    opaque = solids[~solids.hollow]
    from_light = points.T - light[:, None]
    opaque = opaque[opaque.in_cone(light, from_light)]
    return (_distances(points.T, -from_light, opaque) >= 1).all(dim=0)


def _distances(origins: Tensor, directions: Tensor, solids: Solids) -> Tensor:
    """Lengths of each ray until it hits each solid (N, P), infinite where it does not."""
    distances = directions.new_full((len(solids.yaw), directions.shape[1]), math.inf)
    for is_round, lengths_to in ((False, _to_boxes), (True, _to_ellipsoids)):
        of_kind = solids.round == is_round
        if of_kind.any():
            distances[of_kind] = lengths_to(origins, directions, solids[of_kind])
    return distances


def _to_boxes(origins: Tensor, directions: Tensor, boxes: Solids) -> Tensor:
    origins, directions = boxes.unit_rays(origins, directions)
    # Nothing but a zero is changed by so little, and what lies along a side needs a finite inverse.
    inverse = directions.add_(1e-20).reciprocal_()
    middle, reach = origins.mul(inverse).neg_(), inverse.abs_()
    entry, leave = (middle - reach).amax(dim=0), middle.add_(reach).amin(dim=0)
    missed = entry > leave
    entry[boxes.hollow] = leave[boxes.hollow]
    return entry.masked_fill_(missed.logical_or_(entry < _NEAR), math.inf)


def _to_ellipsoids(origins: Tensor, directions: Tensor, ellipsoids: Solids) -> Tensor:
    origins, directions = ellipsoids.unit_rays(origins, directions)
    square = directions.square().sum(dim=0)
    along = (origins * directions).sum(dim=0)
    root = along.square() - square * (origins.square().sum(dim=0) - 1)
    length = (-along - root.clamp(min=0).sqrt()) / square
    return length.masked_fill_((root <= 0).logical_or_(length < _NEAR), math.inf)


def _angle(cosine: Tensor) -> Tensor:
    return cosine.clamp(-1, 1).acos()
