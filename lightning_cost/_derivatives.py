"""Products of Hessians of the task losses with vectors."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_cost._arguments import check_choice, check_effect, check_positive
from lightning_cost.surface import Surface

__all__: list[str] = []

Derivative = Literal["finite_difference", "double_backward"]

EPSILON = 5e-3
"""Length of a finite difference, relative to the norm of the shared parameters."""


def hessian_vector(surface: Surface, weights: Tensor, gradient: Tensor, vector: Tensor, epsilon: float) -> Tensor:
    """The Hessian of a weighted sum of the task losses times a vector, by a one-sided difference of its gradients.

    Args:
        surface: The losses.
        weights: The weights, shape ``(K,)``.
        gradient: The gradient of the weighted sum where the surface is, shape ``(P,)``.
        vector: The vector, shape ``(P,)``.
        epsilon: Length of the difference, relative to the norm of the shared parameters.
    """
    norm = float(vector.norm())
    if norm == 0:
        return torch.zeros_like(vector)
    length = epsilon * max(surface.norm(), epsilon)
    with surface.displaced(vector, length / norm):
        moved = surface.gradient(weights)[1]
    return moved.sub_(gradient).mul_(norm / length)


def check_derivative(derivative: Derivative, epsilon: float) -> None:
    """Check the options of objectives that differentiate gradients.

    Raises:
        ValueError: If one is out of range, or has no effect.
    """
    check_choice("derivative", derivative, get_args(Derivative))
    check_positive("epsilon", epsilon)
    if derivative == "double_backward":
        check_effect("epsilon", epsilon, EPSILON, "with `derivative='double_backward'`")
