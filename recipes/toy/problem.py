"""The two-parameter problem of CAGrad (Liu et al., 2021): two losses, three starts and the Pareto front."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["STARTS", "TASKS", "distance_to_front", "pareto_front", "toy_losses"]

TASKS = ("L1", "L2")
STARTS = ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0))
"""The standard starts (t1, t2)."""

# Keeps the logarithms finite at the bottom of their valleys.
_SMALLEST = 5e-6


def toy_losses(theta: Tensor) -> Tensor:
    """Evaluate both losses.

    For t2 < 0 each is a bowl, around t1 = 7 and t1 = -7. For t2 > 0 each is a logarithm with a narrow, bent valley, at
    t1 = -7 + 2 tanh(t2) and t1 = 7 - 2 tanh(t2). Both fade to 0 at t2 = 0.

    Args:
        theta: Points (t1, t2), shape (..., 2).

    Returns:
        L1 and L2, shape (..., 2). They can be negative.
    """
    t1, t2 = theta.unbind(-1)
    bend = torch.tanh(t2)
    valleys = torch.stack([0.5 * (-t1 - 7) + bend, 0.5 * (-t1 + 3) - bend + 2], -1)
    bowls = torch.stack([(t1 - 7) ** 2, (t1 + 7) ** 2], -1) + 0.1 * (t2 + 8).square().unsqueeze(-1)
    above, below = (torch.tanh(0.5 * side * t2).clamp_min(0).unsqueeze(-1) for side in (1, -1))
    return above * (valleys.abs().clamp_min(_SMALLEST).log() + 6) + below * (bowls / 10 - 20)


@cache
def pareto_front(num: int = 2001) -> Tensor:
    """Points of the Pareto front, evenly spaced along t1 from -7 to 7.

    It lies in the bowls. A weighted sum of both losses is stationary in t1 where t1 / 7 is the difference of the
    weights. Put into its derivative by t2, this leaves one equation for t2, which has one root between -9 and -8:
    -8.355 at t1 = 0, where the mean of the losses has its minimum, and -8.434 at both ends.

    Args:
        num: Number of points.

    Returns:
        Points (t1, t2), shape (num, 2), float64.
    """
    t1 = torch.linspace(-7, 7, num, dtype=torch.float64)
    depth = (49 - t1**2) / 10 - 20
    low, high = torch.full_like(t1, -9), torch.full_like(t1, -8)
    for _ in range(60):
        t2 = (low + high) / 2
        fade = torch.tanh(-0.5 * t2)
        slope = 0.02 * (t2 + 8) * fade - 0.5 * (1 - fade**2) * (depth + 0.01 * (t2 + 8) ** 2)
        low, high = torch.where(slope < 0, t2, low), torch.where(slope < 0, high, t2)
    return torch.stack([t1, (low + high) / 2], dim=-1)


def distance_to_front(theta: Tensor) -> Tensor:
    """Distance to the nearest point of the Pareto front.

    Args:
        theta: Points (t1, t2), shape (..., 2).

    Returns:
        Shape (...), float64.
    """
    return (theta.double().unsqueeze(-2) - pareto_front()).norm(dim=-1).amin(-1)
