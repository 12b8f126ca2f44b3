"""The paper's search: an optimizer of its own on the parameters of an adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import override

from lightning_cost._arguments import (
    check_between,
    check_bool,
    check_effect,
    check_integer,
    check_not_negative,
    check_positive,
)
from lightning_cost._vectors import combine
from lightning_cost.invariance import loss_fluctuation, loss_fluctuation_weights
from lightning_cost.objectives import checked_gradient
from lightning_cost.searches._adapters import (
    PeftAdapter,
    changed_fields,
    check_targets_exist,
    is_target,
    reachable_layers,
    unreachable_message,
)
from lightning_cost.searches._base import Search, SearchContext
from lightning_cost.searches._config import check_config
from lightning_cost.surface import Point

__all__ = ["PenaltySearch"]


class PenaltySearch(Search):
    r"""Trains an adapter with Adam on :math:`L_t - \gamma L_g` (Eq. 11) and merges it.

    :math:`L_t` is the loss fluctuation (Eq. 7) and :math:`L_g` the objective; the paper's is
    :class:`~lightning_cost.objectives.SampledSharpness` (Eq. 9). The search computes the gradient with respect to the
    weights. The chain rule gives the gradient with respect to the adapter.

    Args:
        adapter: PEFT configuration of the change of the weights: LoRA, LoHa or LoKr. Its ``target_modules``, if set,
            choose among the layers of the shared modules. ``None`` for LoRA of rank 5, the paper's.
        steps: Number of Adam steps. The paper does not state it.
        lr: Their learning rate; ``None`` takes the one of the shared parameters, as the paper does.
        gamma: The weight :math:`\gamma` of the objective.
        relative: Whether :math:`L_t` measures each loss relative to where it was. Eq. 7 does not, and fails where tasks
            differ in scale.
        invariance_weight: A factor of :math:`L_t`: 1 in Eq. 11, 0 in the ablation without it (Table 4).
        backtracks: How often a refused change is shortened.
        shrink: The factor by which it is shortened.

    Raises:
        ValueError: If an argument is out of range, or has no effect beside another.
    """

    uses_aim = False

    def __init__(
        self,
        adapter: PeftConfig | None = None,
        steps: int = 30,
        lr: float | None = None,
        gamma: float = 0.1,
        relative: bool = True,
        invariance_weight: float = 1.0,
        backtracks: int = 3,
        shrink: float = 0.4,
    ) -> None:
        check_integer("steps", steps, 1)
        if lr is not None:
            check_positive("lr", lr)
        check_not_negative("gamma", gamma)
        check_not_negative("invariance_weight", invariance_weight)
        check_bool("relative", relative)
        if gamma == 0 and invariance_weight == 0:
            raise ValueError("`gamma=0` with `invariance_weight=0` leaves nothing to search for. Raise one of the two.")
        if invariance_weight == 0:
            check_effect("relative", relative, True, "with `invariance_weight=0`")
        check_integer("backtracks", backtracks, 0)
        check_between("shrink", shrink, 0, 1)
        if backtracks == 0:
            check_effect("shrink", shrink, 0.4, "with `backtracks=0`")
        self.adapter = check_config(LoraConfig(r=5) if adapter is None else adapter)
        self.steps = steps
        self.lr = lr
        self.gamma = gamma
        self.relative = relative
        self.invariance_weight = invariance_weight
        self.backtracks = backtracks
        self.shrink = shrink

    @override
    def candidates(self, context: SearchContext) -> Iterator[None]:
        surface = context.surface
        adapter = PeftAdapter(context.modules, surface.shared, self.adapter, surface.generator)
        optimizer = torch.optim.Adam(adapter.parameters, lr=context.learning_rate if self.lr is None else self.lr)
        spare = None
        for _ in range(self.steps):
            change = adapter.change()
            surface.move_to(context.origin)
            surface.move_by(change.detach())
            gradient, spare = self._gradient(context, spare)
            pulled = torch.autograd.grad(change, adapter.parameters, grad_outputs=gradient, allow_unused=True)
            for parameter, piece in zip(adapter.parameters, pulled, strict=True):
                parameter.grad = piece
            optimizer.step()
        change = adapter.change().detach()
        if not math.isfinite(change.norm()):
            context.record("refused", reason=f"the adapter is not finite after {self.steps} steps")
            return
        for _ in range(1 + self.backtracks):
            surface.move_to(context.origin)
            surface.move_by(change)
            yield
            change.mul_(self.shrink)

    def _gradient(self, context: SearchContext, spare: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradient of Eq. 11 with respect to the shared parameters, and a matrix whose memory is free again."""
        surface, reference = context.surface, context.start.losses

        def fluctuation_weights(losses: Tensor) -> Tensor:
            weights = loss_fluctuation_weights(losses, reference, context.invariance, relative=self.relative)
            return self.invariance_weight * weights

        if context.objective.uses_task_gradients:
            point = surface.point(context.start, spare)
            spare = point.gradients.matrix
            gradient = combine(spare, fluctuation_weights(point.losses))
        else:
            losses, gradient = surface.gradient(fluctuation_weights)
            point = Point(losses)
        value, ascent = checked_gradient(context.objective, surface, point)
        context.record(
            "search",
            losses=point.losses,
            loss_fluctuation=loss_fluctuation(point.losses, reference, context.invariance, relative=self.relative),
            objective=value,
        )
        return gradient.sub_(ascent, alpha=self.gamma), spare

    @override
    def reach(self, modules: Mapping[str, nn.Module], shared: Sequence[Parameter]) -> Sequence[Parameter]:
        for name in ("target_modules", "exclude_modules"):
            check_targets_exist(modules, getattr(self.adapter, name, None), name)
        layers = reachable_layers(modules, shared, self.adapter)
        if not layers:
            raise ValueError(unreachable_message(modules, shared, self.adapter))
        return [dict(layer.named_parameters(recurse=False))["weight"] for layer in layers]

    @override
    def is_target(self, name: str, module: nn.Module) -> bool:
        return is_target(self.adapter, name, module)

    def __repr__(self) -> str:
        return (
            f"PenaltySearch(adapter={changed_fields(self.adapter)}, steps={self.steps}, lr={self.lr},"
            f" gamma={self.gamma}, relative={self.relative}, invariance_weight={self.invariance_weight},"
            f" backtracks={self.backtracks}, shrink={self.shrink})"
        )
