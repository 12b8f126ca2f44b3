"""Which losses a teleport holds, and how to get back to where they were."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_cost._arguments import check_bool, check_choice, check_instance, check_same_shape, check_shape
from lightning_cost._vectors import combine
from lightning_cost.gradients import TaskGradients

__all__ = ["Invariance", "LevelSet", "drift", "loss_fluctuation"]

Invariance: TypeAlias = Literal["per_task", "mean"]
"""``"per_task"`` holds the loss of every task (Eq. 5), ``"mean"`` only their mean."""

_ROUNDING = 16
# An eigenvalue is zero if it is smaller, relative to the largest.
_RANK_TOLERANCE = 1e-6


def held_losses(losses: Tensor, invariance: Invariance) -> Tensor:
    """The losses that are held: all of them, shape ``(K,)``, or their mean, shape ``(1,)``."""
    return losses if invariance == "per_task" else losses.mean(dim=-1, keepdim=True)


def drift(losses: Tensor, reference: Tensor, invariance: Invariance) -> float:
    """The largest relative change of a held loss; NaN or infinite if a loss is."""
    _check_losses(losses, reference, invariance)
    held, before = losses.tolist(), reference.tolist()
    if invariance == "mean":
        held, before = [sum(held) / len(held)], [sum(before) / len(before)]
    changes = [_relative_change(*pair) for pair in zip(held, before, strict=True)]
    return math.nan if any(map(math.isnan, changes)) else max(changes)


def _relative_change(value: float, reference: float) -> float:
    change = abs(value - reference)
    if change == 0 or reference == 0:
        return math.inf if change > 0 else change
    return change / abs(reference)


def loss_fluctuation(losses: Tensor, reference: Tensor, invariance: Invariance, *, relative: bool) -> Tensor:
    r"""The loss fluctuation :math:`L_t = \frac{1}{K} \sum_i |L_i - L_i^*|` (Eq. 7), a scalar.

    Args:
        losses: The losses :math:`L_i`, shape ``(K,)``.
        reference: The losses :math:`L_i^*` before teleporting, shape ``(K,)``.
        invariance: Which losses are held.
        relative: Divide each change by :math:`|L_i^*|`. Tasks of different scales need it; Eq. 7 does not do it.
    """
    _check_losses(losses, reference, invariance)
    check_bool("relative", relative)
    held, before = held_losses(losses, invariance), held_losses(reference, invariance)
    change = (held - before).abs()
    # Compiled code and nondeterministic kernels repeat a loss only up to rounding. Its sign would choose a direction.
    change = change.masked_fill(change <= _ROUNDING * torch.finfo(before.dtype).eps * before.abs(), 0.0)
    if relative:
        change = change / before.abs().clamp_min(torch.finfo(before.dtype).tiny)
    return change.mean()


def loss_fluctuation_weights(losses: Tensor, reference: Tensor, invariance: Invariance, *, relative: bool) -> Tensor:
    """The derivative of :func:`loss_fluctuation` with respect to the losses, shape ``(K,)``."""
    with torch.enable_grad():
        variable = losses.detach().clone().requires_grad_()
        value = loss_fluctuation(variable, reference, invariance, relative=relative)
        gradient: Tensor = torch.autograd.grad(value, variable)[0]
    return gradient


def _check_losses(losses: Tensor, reference: Tensor, invariance: Invariance) -> None:
    check_choice("invariance", invariance, get_args(Invariance))
    check_same_shape("reference", reference, "losses", losses)
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"`losses` must have shape (K,), one loss for each task; got shape {tuple(losses.shape)}.")


@dataclass(frozen=True)
class LevelSet:
    r"""The set of parameters with the losses of a point, to first order around it.

    The rows of :math:`A` are the gradients of the held losses. :meth:`tangent` removes :math:`A^T (A A^T)^+ A v` from a
    vector :math:`v`. :meth:`retraction` is :math:`-A^T (A A^T)^+ r` for residuals :math:`r`: a chord step of Newton's
    method. Rows are scaled to unit length before the pseudo-inverse, so that tasks of all scales count alike.

    Args:
        gradients: Task gradients at the point.
        invariance: Which losses are held.
    """

    gradients: TaskGradients
    invariance: Invariance

    def __post_init__(self) -> None:
        check_instance("gradients", self.gradients, TaskGradients, "a TaskGradients")
        check_choice("invariance", self.invariance, get_args(Invariance))

    def tangent(self, vector: Tensor) -> Tensor:
        """The part of a vector of shape ``(P,)`` along which no held loss changes to first order."""
        check_shape("vector", vector, self.gradients.matrix.shape[1:], "one element for each column of the gradients")
        return self._combine(self.gradients.matrix @ vector).neg_().add_(vector)

    def retraction(self, residuals: Tensor) -> Tensor:
        """The smallest step, shape ``(P,)``, that to first order undoes residuals of the losses, shape ``(K,)``."""
        check_shape("residuals", residuals, self.gradients.matrix.shape[:1], "one for each task")
        return self._combine(residuals).neg_()

    def _combine(self, changes: Tensor) -> Tensor:
        return combine(self.gradients.matrix, self._solve @ changes.cpu().double())

    @cached_property
    def _solve(self) -> Tensor:
        """The matrix that turns changes of the losses into weights of the rows, shape ``(K, K)``, on the CPU."""
        gramian = self.gradients.gramian.cpu().double()
        selection = torch.eye(len(gramian), dtype=torch.float64)
        if self.invariance == "mean":
            selection = selection.mean(dim=0, keepdim=True)
        gramian = selection @ gramian @ selection.T
        norms = gramian.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        scaled = inverse[:, None] * gramian * inverse[None, :]
        solution: Tensor
        if scaled.shape == (2, 2) and bool((norms > 0).all()):
            solution = _pseudo_inverse_of_correlation(float(scaled[0, 1]))
        else:
            solution = torch.linalg.pinv(scaled, rtol=_RANK_TOLERANCE, hermitian=True)
        scaled_selection = inverse[:, None] * selection
        return scaled_selection.T @ solution @ scaled_selection


def _pseudo_inverse_of_correlation(correlation: float) -> Tensor:
    """The pseudo-inverse of two rows with ones on the diagonal, whose eigenvectors are their sum and difference."""
    smallest = _RANK_TOLERANCE * (1 + abs(correlation))
    total, difference = (1 / value if value > smallest else 0.0 for value in (1 + correlation, 1 - correlation))
    same, other = (total + difference) / 2, (total - difference) / 2
    return torch.tensor([[same, other], [other, same]], dtype=torch.float64)
