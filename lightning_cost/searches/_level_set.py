"""The level set search: step along the level set, and retract."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import LoraConfig
from torch import nn
from torch.nn import Parameter
from typing_extensions import override

from lightning_cost._arguments import (
    check_between,
    check_bool,
    check_effect,
    check_integer,
    check_positive,
    check_targets,
)
from lightning_cost._vectors import norm_of
from lightning_cost.invariance import LevelSet, drift
from lightning_cost.objectives import checked_aim, checked_gradient
from lightning_cost.searches._adapters import check_targets_exist, is_target, low_rank, matrix_parameters
from lightning_cost.searches._base import Search, SearchContext

__all__ = ["LevelSetSearch"]

# Bounds of the factor that the drift of a refused step suggests.
_LEAST, _MOST = 0.1, 0.5
# A step along the tangent that changes a loss by so many times the tolerance is too long for a chord step.
_HOPELESS = 5


class LevelSetSearch(Search):
    r"""Moves along the level set of the task losses with a LoRA that is aligned with the objective's gradient.

    1. The direction is the gradient :math:`h` of the objective, without its part in the span of the gradients of the
       held losses. To first order, no held loss changes along it. For each weight, a LoRA takes the best approximation
       of this direction with the given rank.
    2. The step is as long as the objective needs, to first order, to reach what it aims at. A chord step with the
       gradients at hand then leads back to the held losses.
    3. If the candidate is refused, the step is shortened.

    A candidate takes two forward passes, and the backward passes that the update needs in any case.

    Args:
        rank: Rank of the LoRA.
        target_modules: The modules whose weights may change: names or endings of names, a regular expression, or
            ``"all-linear"``, as in :class:`peft.LoraConfig`. ``None`` for all. The search changes weights with two or
            more dimensions, whatever the class of their module.
        full_rank: Move all shared parameters freely instead of by a LoRA.
        size: Longest step, relative to the norm of the weights that move. An objective without an aim takes all of it.
        steps: Number of steps, each from where the last one arrived.
        backtracks: How often a refused step is shortened.
        shrink: The factor by which it is shortened. ``None`` takes what the change of the losses suggests, which is of
            second order in the length, and of third order after the chord step. A step that changes a loss by more than
            five times the tolerance is shortened before its chord step.

    Raises:
        ValueError: If an argument is out of range, or has no effect beside another.
    """

    def __init__(
        self,
        rank: int = 5,
        target_modules: Sequence[str] | str | None = None,
        full_rank: bool = False,
        size: float = 0.04,
        steps: int = 1,
        backtracks: int = 3,
        shrink: float | None = 0.4,
    ) -> None:
        check_integer("rank", rank, 1)
        check_targets("target_modules", target_modules)
        check_bool("full_rank", full_rank)
        if full_rank:
            check_effect("rank", rank, 5, "with `full_rank=True`")
            check_effect("target_modules", target_modules, None, "with `full_rank=True`")
        check_positive("size", size)
        check_integer("steps", steps, 1)
        check_integer("backtracks", backtracks, 0)
        if shrink is not None:
            check_between("shrink", shrink, 0, 1)
        if backtracks == 0:
            check_effect("shrink", shrink, 0.4, "with `backtracks=0`")
        self.rank = rank
        self.target_modules = (
            target_modules if target_modules is None or isinstance(target_modules, str) else list(target_modules)
        )
        self._targets = None if self.target_modules is None else LoraConfig(target_modules=self.target_modules)
        self.full_rank = full_rank
        self.size = size
        self.rounds = steps
        self.backtracks = backtracks
        self.shrink = shrink

    @override
    def candidates(self, context: SearchContext) -> Iterator[None]:
        surface, start = context.surface, context.start
        level_set = LevelSet(start.gradients, context.invariance)
        surface.hold(context.origin)
        value, gradient = checked_gradient(context.objective, surface, start)
        norm = float(gradient.norm())
        if not math.isfinite(norm):
            context.record("refused", reason=f"the gradient of {type(context.objective).__name__} is not finite")
            return
        tangent = step = level_set.tangent(gradient)
        # If the objective changes only together with the held losses, what is left is rounding, and no direction.
        if not tangent.norm() > 100 * torch.finfo(tangent.dtype).eps * norm:
            return
        scale = surface.norm()
        if not self.full_rank:
            targets = self.reach(context.modules, surface.shared)
            step = low_rank(step, surface.shared, targets, self.rank)
            scale = norm_of(targets)
        length = step.norm()
        if not length > 0:
            return
        reach = self.size * scale
        if value is not None:
            slope = float(tangent @ step / length)
            if not slope > 0:
                return
            reach = min(reach, (checked_aim(context.objective, value) - value) / slope)
        reach /= float(length)
        for attempt in range(1 + self.backtracks):
            if attempt:
                surface.move_to(context.origin)
            surface.move_by(step, reach)
            losses = surface.losses()
            change = drift(losses, start.losses, context.invariance)
            context.record("step", losses=losses, drift=change)
            if self.shrink is None and attempt < self.backtracks and _is_hopeless(change, context.tolerance):
                # The losses say it before the chord step: a candidate would cost another forward pass.
                reach *= _factor(context.tolerance, 3 * change, 1 / 2)
                continue
            surface.move_by(level_set.retraction(losses - start.losses))
            yield
            if self.shrink is not None:
                reach *= self.shrink
            else:
                reach *= _factor(context.tolerance, 2 * context.drifts[-1] if context.drifts else math.nan, 1 / 3)

    @override
    def reach(self, modules: Mapping[str, nn.Module], shared: Sequence[Parameter]) -> Sequence[Parameter]:
        if self.full_rank:
            return shared
        check_targets_exist(modules, self.target_modules)
        reached = matrix_parameters(modules, shared, self.is_target)
        if not reached:
            raise ValueError(
                f"LevelSetSearch with `target_modules={self.target_modules!r}` reaches no weight of the shared modules."
                " It reaches weights with two or more dimensions that require a gradient. Leave `target_modules` unset"
                " to take all, or pass `full_rank=True` to move every shared parameter."
            )
        return reached

    @override
    def is_target(self, name: str, module: nn.Module) -> bool:
        return self._targets is None or is_target(self._targets, name, module)

    def __repr__(self) -> str:
        where = "full_rank=True" if self.full_rank else f"rank={self.rank}, target_modules={self.target_modules!r}"
        return (
            f"LevelSetSearch({where}, size={self.size}, steps={self.rounds}, backtracks={self.backtracks},"
            f" shrink={self.shrink})"
        )


def _is_hopeless(change: float, tolerance: float | None) -> bool:
    """Whether no chord step leads back from such a change of the losses."""
    return tolerance is not None and not change <= _HOPELESS * tolerance


def _factor(tolerance: float | None, change: float, power: float) -> float:
    """How much shorter a step must be, if the change of the losses grows with its length to ``1 / power``."""
    if tolerance is None or not math.isfinite(change) or change <= 0:
        return _LEAST
    factor: float = (tolerance / change) ** power
    return min(max(factor, _LEAST), _MOST)
