"""The paper's search: an optimizer of its own on the parameters of an adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from peft import PeftConfig
from torch import nn
from torch.nn import Parameter
from typing_extensions import override

from lightning_cost.adapters import PeftAdapter, reachable_layers, unreachable_message
from lightning_cost.gradients import GradientBuffer, combine
from lightning_cost.invariance import loss_fluctuation, loss_fluctuation_weights
from lightning_cost.landscape import Point
from lightning_cost.searches._base import Search, SearchContext

__all__ = ["PenaltySearch"]


class PenaltySearch(Search):
    r"""Trains an adapter with Adam on :math:`L_t - \gamma L_g` (Eq. 11) and merges it.

    :math:`L_t` is the loss fluctuation (Eq. 7) and :math:`L_g` the objective; the paper's is
    :class:`~lightning_cost.objectives.SampledSharpness` (Eq. 9). The gradient with respect to the adapter is that with
    respect to the weights, pulled back through the weight change that the adapter means.

    Args:
        steps: Number of Adam steps. The paper does not state it.
        lr: Their learning rate; ``None`` takes the one of the shared parameters, as the paper does.
        gamma: The weight :math:`\gamma` of the objective.
        relative: Whether :math:`L_t` measures each loss relative to where it was. Eq. 7 does not, and fails where tasks
            differ in scale.
        invariance_weight: A factor of :math:`L_t`: 1 in Eq. 11, 0 in the ablation that leaves it out (Table 4).
        backtracks: How often a refused change is shortened.
        shrink: The factor it is shortened by.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        steps: int = 30,
        lr: float | None = None,
        gamma: float = 0.1,
        relative: bool = True,
        invariance_weight: float = 1.0,
        backtracks: int = 3,
        shrink: float = 0.4,
    ) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be an integer of at least 1; got {steps!r}.")
        if lr is not None and not lr > 0:
            raise ValueError(f"`lr` must be positive, or None for the optimizer's; got {lr!r}.")
        if not gamma >= 0:
            raise ValueError(f"`gamma` must not be negative; got {gamma!r}.")
        if not 0 <= invariance_weight < math.inf:
            raise ValueError(f"`invariance_weight` must be a number of at least 0; got {invariance_weight!r}.")
        if not isinstance(backtracks, int) or backtracks < 0:
            raise ValueError(f"`backtracks` must be an integer of at least 0; got {backtracks!r}.")
        if not 0 < shrink < 1:
            raise ValueError(f"`shrink` must be between 0 and 1; got {shrink!r}.")
        self.steps = steps
        self.lr = lr
        self.gamma = gamma
        self.relative = relative
        self.invariance_weight = invariance_weight
        self.backtracks = backtracks
        self.shrink = shrink

    @override
    def candidates(self, context: SearchContext) -> Iterator[None]:
        landscape = context.landscape
        origin = landscape.position()
        adapter = PeftAdapter(context.modules, landscape.shared, context.adapter, landscape.generator)
        optimizer = torch.optim.Adam(adapter.parameters, lr=context.learning_rate if self.lr is None else self.lr)
        buffer = GradientBuffer()
        for _ in range(self.steps):
            change = adapter.change()
            landscape.move_to(origin)
            landscape.move_by(change.detach())
            gradient = self._gradient(context, buffer)
            pulled = torch.autograd.grad(change, adapter.parameters, grad_outputs=gradient, allow_unused=True)
            for parameter, piece in zip(adapter.parameters, pulled, strict=True):
                parameter.grad = piece
            optimizer.step()
        change = adapter.change().detach()
        for _ in range(1 + self.backtracks):
            landscape.move_to(origin)
            landscape.move_by(change)
            yield
            change.mul_(self.shrink)

    def _gradient(self, context: SearchContext, buffer: GradientBuffer) -> torch.Tensor:
        """The gradient of Eq. 11 with respect to the shared parameters."""
        landscape, reference = context.landscape, context.start.losses

        def fluctuation_weights(losses: torch.Tensor) -> torch.Tensor:
            weights = loss_fluctuation_weights(losses, reference, context.invariance, relative=self.relative)
            return self.invariance_weight * weights

        if context.objective.uses_task_gradients:
            buffer.restart(context.start.gradients, context.start.losses.tolist())
            evaluated = landscape.point(buffer)
            assert evaluated is not None
            point = evaluated
            gradient = combine(point.gradients.matrix, fluctuation_weights(point.losses))
        else:
            losses, gradient = landscape.gradient(fluctuation_weights)
            point = Point(losses)
        value, ascent = context.objective.value_and_gradient(landscape, point)
        context.record(
            "search",
            losses=point.losses,
            loss_fluctuation=loss_fluctuation(point.losses, reference, context.invariance, relative=self.relative),
            objective=value,
        )
        return gradient.sub_(ascent, alpha=self.gamma)

    @override
    def reach(
        self, modules: Sequence[tuple[str, nn.Module]], shared: Sequence[Parameter], adapter: PeftConfig
    ) -> Sequence[Parameter]:
        layers = reachable_layers(modules, shared, adapter)
        if not layers:
            raise ValueError(unreachable_message(adapter))
        return [dict(layer.named_parameters(recurse=False))["weight"] for layer in layers]

    def __repr__(self) -> str:
        return (
            f"PenaltySearch(steps={self.steps}, lr={self.lr}, gamma={self.gamma}, relative={self.relative},"
            f" invariance_weight={self.invariance_weight},"
            f" backtracks={self.backtracks}, shrink={self.shrink})"
        )
