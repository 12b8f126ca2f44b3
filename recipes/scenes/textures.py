"""Procedural patterns: how much of its accent a surface shows at each of its points."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["Pattern", "accent_share"]


class Pattern(IntEnum):
    """What a surface looks like; the size of its cells is in metres."""

    PLAIN = 0
    STRIPES = 1
    """Vertical, as wide as half a cell."""
    CHECKS = 2
    PLANKS = 3
    """Rows of planks, each in its own shade, with joints in the accent."""
    CLOUDS = 4
    """Smooth noise."""
    PANES = 5
    """A grid of accented rectangles, as the windows of a house."""
    SPINES = 6
    """Vertical strips, each in its own shade, as books on a shelf."""


def accent_share(pattern: Tensor, surface: Tensor, cell: Tensor, salt: Tensor) -> Tensor:
    """Share of the accent colour in the colour of points of patterned surfaces.

    Args:
        pattern: Values of `Pattern` (P,).
        surface: Coordinates on the surface (2, P), in metres.
        cell: Size of the pattern's cells (P,), in metres.
        salt: What makes one surface's noise another than the next one's: integers (P,).

    Returns:
        Shares (P,) in [0, 1].
    """
    share = torch.zeros_like(cell)
    across, up = surface / cell
    for kind in pattern.unique().tolist():
        if draw := _DRAWN.get(Pattern(kind)):
            chosen = (pattern == kind).nonzero()[:, 0]
            share[chosen] = draw(across[chosen], up[chosen], salt[chosen])
    return share


def _stripes(across: Tensor, up: Tensor, salt: Tensor) -> Tensor:
    return (across.remainder(1) < 0.5).float()


def _checks(across: Tensor, up: Tensor, salt: Tensor) -> Tensor:
    return (across.floor() + up.floor()).remainder(2)


def _planks(across: Tensor, up: Tensor, salt: Tensor) -> Tensor:
    row = up.floor()
    # Planks are four times as long as wide, and begin anywhere.
    along = across / 4 + _noise(row, torch.zeros_like(row), salt + 1)
    joint = torch.minimum(_inside(up - row, 0.06), _inside(along - along.floor(), 0.015))
    return torch.where(joint > 0, 0.45 * _noise(row, along.floor(), salt), 1.0)


def _clouds(across: Tensor, up: Tensor, salt: Tensor) -> Tensor:
    return 0.65 * _smooth_noise(across, up, salt) + 0.35 * _smooth_noise(3 * across, 3 * up, salt + 1)


def _panes(across: Tensor, up: Tensor, salt: Tensor) -> Tensor:
    return _inside(across.remainder(1), 0.24) * _inside(up.remainder(1), 0.2)


def _spines(across: Tensor, up: Tensor, salt: Tensor) -> Tensor:
    return _noise(across.floor(), torch.zeros_like(up), salt)


def _inside(part: Tensor, margin: float) -> Tensor:
    return ((part > margin) & (part < 1 - margin)).float()


def _smooth_noise(across: Tensor, up: Tensor, salt: Tensor) -> Tensor:
    column, row = across.floor(), up.floor()
    right, above = (_smoothstep(part) for part in (across - column, up - row))
    low = torch.lerp(_noise(column, row, salt), _noise(column + 1, row, salt), right)
    high = torch.lerp(_noise(column, row + 1, salt), _noise(column + 1, row + 1, salt), right)
    return torch.lerp(low, high, above)


def _smoothstep(part: Tensor) -> Tensor:
    return part * part * (3 - 2 * part)


def _noise(column: Tensor, row: Tensor, salt: Tensor) -> Tensor:
    """A number in [0, 1) for each pair of integers, hashed: no generator could be asked for any cell in any order."""
    mixed = column.long() * 0x27D4EB2F + row.long() * 0x165667B1 + salt * 0x2545F491
    for factor in (0x2C1B3C6D, 0x297A2D39):
        mixed = mixed & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * factor
    return (mixed >> 12 & 0xFFFF).float() / 0x10000


_DRAWN = {
    Pattern.STRIPES: _stripes,
    Pattern.CHECKS: _checks,
    Pattern.PLANKS: _planks,
    Pattern.CLOUDS: _clouds,
    Pattern.PANES: _panes,
    Pattern.SPINES: _spines,
}
