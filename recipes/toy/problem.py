"""The two-parameter problem of CAGrad (Liu et al., 2021): two losses, three starts and the Pareto front."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_cost import TaskGradients

__all__ = ["STARTS", "TASKS", "gap_to_front", "pareto_front", "pareto_stationarity", "toy_losses"]

TASKS = ("L1", "L2")
STARTS = ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0))
"""The standard starts (t1, t2)."""

# Keeps the logarithms finite in their valleys.
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
def pareto_front() -> Tensor:
    """Points of the Pareto front, evenly spaced along t1 from -7 to 7.

    It lies in the bowls. A weighted sum of both losses is stationary in t1 if t1 / 7 is the difference of the weights.
    Insert this into its derivative by t2: one equation for t2 remains. Bisection finds its root between -9 and -8:
    -8.355 at t1 = 0, where the mean of the losses has its minimum, and -8.434 at both ends.

    Returns:
        Points (t1, t2), shape (2001, 2), float64.
    """
    t1 = torch.linspace(-7, 7, 2001, dtype=torch.float64)
    depth = (49 - t1**2) / 10 - 20
    low, high = torch.full_like(t1, -9), torch.full_like(t1, -8)
    for _ in range(60):
        t2 = (low + high) / 2
        fade = torch.tanh(-0.5 * t2)
        slope = 0.02 * (t2 + 8) * fade - 0.5 * (1 - fade**2) * (depth + 0.01 * (t2 + 8) ** 2)
        low, high = torch.where(slope < 0, t2, low), torch.where(slope < 0, high, t2)
    return torch.stack([t1, (low + high) / 2], dim=-1)


def gap_to_front(theta: Tensor) -> float:
    """By how much both losses can still fall at once; 0 on the Pareto front.

    The point of the front that lowers both losses equally has the same difference of the losses. This difference is
    monotonic along the front. Beyond an end of the front, that end is the best point.

    Args:
        theta: A point (t1, t2), shape (2,).
    """
    losses = toy_losses(theta.double()).numpy()
    difference, *front = _front_losses()
    best = [np.interp(losses[0] - losses[1], difference, loss) for loss in front]
    return float((losses - best).min())


def pareto_stationarity(theta: Tensor) -> float:
    """The norm of the shortest convex combination of both gradients: 0 where nothing lowers both to first order.

    Args:
        theta: A point (t1, t2), shape (2,).
    """
    rows = torch.autograd.functional.jacobian(toy_losses, theta.double())
    return TaskGradients(TASKS, rows).pareto_stationarity.item()


@cache
def _front_losses() -> tuple[NDArray[np.float64], ...]:
    """L1 - L2, in ascending order, L1 and L2 along the front."""
    first, second = toy_losses(pareto_front()).flip(0).numpy().T
    return first - second, first, second
