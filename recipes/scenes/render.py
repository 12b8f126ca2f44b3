"""From a scene to its picture, and to the true label, depth and normal of every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recipes.scenes.geometry import Hits, Solids, cast, is_lit
from recipes.scenes.scene import Scene, Sky, Surfaces
from recipes.scenes.textures import Pattern, accent_share

__all__ = ["Frame", "photograph", "render"]

# Rows and columns of the pixels that are rendered at once.
_TILE = 48
# Of a point off its surface, in metres, so that the surface does not cast a shadow on itself.
_LIFT = 1e-3


@dataclass(frozen=True)
class Frame:
    """A picture and what it shows.

    Args:
        image: Red, green and blue in [0, 1] (H, W, 3).
        label: Index of the class (H, W); -1 where it is not known.
        depth: Distance along the optical axis in metres (H, W); 0 where it is not known, or infinite.
        normal: Unit vectors away from the surface (H, W, 3), in the camera's axes right, up and backward; 0 where they
            are not known.
    """

    image: Tensor
    label: Tensor
    depth: Tensor
    normal: Tensor


def render(scene: Scene) -> Frame:
    """Cast a ray through the centre of every pixel, and one from where it ends to every light."""
    solids, surfaces = scene.solids(), scene.surfaces()
    # Tile by tile, for which most solids are out of sight.
    bands = [
        [_render(scene, solids, surfaces, tile) for tile in band.split(_TILE, dim=2)]
        for band in scene.camera.rays().split(_TILE, dim=1)
    ]
    rows = [[torch.cat(pieces, dim=1) for pieces in zip(*band, strict=True)] for band in bands]
    image, label, depth, normal = (torch.cat(pieces) for pieces in zip(*rows, strict=True))
    return Frame(image.clamp(0, 1), label, depth, normal)


def _render(scene: Scene, solids: Solids, surfaces: Surfaces, tile: Tensor) -> tuple[Tensor, ...]:
    """Image, label, depth and normal of some rows and columns of rays."""
    rays = tile.flatten(1)
    hits = cast(torch.tensor(scene.camera.position), rays, solids)
    material = surfaces.of_side[hits.solid, hits.face]
    image = _shade(scene, solids, surfaces, hits, material, rays)
    label, depth, normal = surfaces.label[material], hits.distance, hits.normal @ scene.camera.axes().T
    if scene.sky:
        missed = hits.solid < 0
        image = _fade(image, scene.sky, depth)
        image[missed] = _background(scene.sky, rays.T[missed])
        label, depth = label.masked_fill(missed, scene.sky.label), depth.masked_fill(missed, 0.0)
        normal = normal.masked_fill(missed[:, None], 0.0)
    return tuple(flat.unflatten(0, tile.shape[1:]) for flat in (image, label, depth, normal))


def photograph(image: Tensor, rng: np.random.Generator, noise: float) -> Tensor:
    """What a camera makes of a picture: a slightly soft lens, noise, and 8 bits.

    Args:
        image: (H, W, 3) in [0, 1].
        rng: Draws the noise.
        noise: Its standard deviation.
    """
    planes = image.permute(2, 0, 1)
    padded = torch.nn.functional.pad(planes[None], (1, 1, 1, 1), mode="replicate")[0]
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    soft = (0.6 * planes + 0.1 * around).permute(1, 2, 0)
    grain = torch.from_numpy(rng.standard_normal(tuple(soft.shape), dtype=np.float32))
    return (soft + noise * grain).clamp(0, 1).mul(255).round() / 255


def _shade(scene: Scene, solids: Solids, surfaces: Surfaces, hits: Hits, material: Tensor, rays: Tensor) -> Tensor:
    salt = 6 * hits.solid + hits.face
    share = accent_share(surfaces.pattern[material], hits.surface, surfaces.cell[material], salt)
    own = torch.lerp(surfaces.colour[material], surfaces.accent[material], share[:, None])

    # Lighter from above, and a little from the viewer: sides that a light misses still differ.
    facing = -(hits.normal * torch.nn.functional.normalize(rays.T, dim=1)).sum(dim=1)
    light = (0.7 + 0.15 * hits.normal[:, 1] + 0.3 * facing)[:, None] * torch.tensor(scene.ambient)
    lifted = hits.point + _LIFT * hits.normal
    for lamp in scene.lights:
        position = torch.tensor(lamp.position)
        towards = position - lifted
        distance = towards.norm(dim=1)
        strength = (hits.normal * towards).sum(dim=1).clamp(min=0) / distance / (1 + (distance / lamp.reach).square())
        # Only where there is light to lose: half of all sides look away from a lamp.
        bright = (strength > 0).nonzero()[:, 0]
        strength[bright] *= is_lit(lifted[bright], position, solids)
        light = light + strength[:, None] * torch.tensor(lamp.colour)
    return own * torch.lerp(light, torch.ones_like(light), surfaces.glow[material][:, None])


def _fade(image: Tensor, sky: Sky, depth: Tensor) -> Tensor:
    return torch.lerp(torch.tensor(sky.horizon), image, (-depth / sky.haze).exp()[:, None])


def _background(sky: Sky, rays: Tensor) -> Tensor:
    height = (rays[:, 1] / rays[:, [0, 2]].norm(dim=1)).clamp(0, 1)
    colour = torch.lerp(torch.tensor(sky.horizon), torch.tensor(sky.zenith), height[:, None].sqrt())
    # On a plane far above, where clouds get smaller towards the horizon.
    flat = rays[:, [0, 2]].T / (height + 0.15)
    count = len(rays)
    pattern, salt = torch.full((count,), int(Pattern.CLOUDS)), torch.full((count,), sky.salt)
    noise = accent_share(pattern, flat, torch.ones(count), salt)
    cover = ((noise - 0.75 + 0.5 * sky.clouds) * 4).clamp(0, 1) * sky.clouds
    return torch.lerp(colour, torch.ones(3), cover[:, None])
