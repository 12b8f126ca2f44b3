"""The level set search: step along the level set, and retract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from torch.nn import Parameter
from typing_extensions import override

from lightning_cost.adapters import low_rank, matrix_parameters, unreachable_message
from lightning_cost.gradients import norm_of
from lightning_cost.invariance import LevelSet, drift
from lightning_cost.searches._base import Search, SearchContext

__all__ = ["LevelSetSearch"]


class LevelSetSearch(Search):
    r"""Moves along the level set of the task losses with a LoRA that is aligned with the objective's gradient.

    1. The direction is the gradient :math:`h` of the objective without its part in the span of the gradients of the
       held losses, so that to first order no held loss moves. A LoRA of the configured rank takes it, weight by weight.
    2. A step in it, as long as the objective needs to first order to reach what it aims at, then a chord step with the
       gradients at hand back to the held losses.
    3. If the candidate is refused, the step is shortened.

    One candidate takes two forward passes, and the backward passes that the update of the step needs in any case.

    Args:
        size: Longest step, relative to the norm of the weights that move. Objectives without an aim take all of it.
        steps: Number of steps, each from where the last one arrived.
        backtracks: How often a refused step is shortened.
        shrink: The factor it is shortened by.
        full_rank: Move all shared parameters freely instead of by a LoRA.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        size: float = 0.04,
        steps: int = 1,
        backtracks: int = 3,
        shrink: float = 0.4,
        full_rank: bool = False,
    ) -> None:
        if not size > 0:
            raise ValueError(f"`size` must be positive; got {size!r}.")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be an integer of at least 1; got {steps!r}.")
        if not isinstance(backtracks, int) or backtracks < 0:
            raise ValueError(f"`backtracks` must be an integer of at least 0; got {backtracks!r}.")
        if not 0 < shrink < 1:
            raise ValueError(f"`shrink` must be between 0 and 1; got {shrink!r}.")
        self.size = size
        self.rounds = steps
        self.backtracks = backtracks
        self.shrink = shrink
        self.full_rank = full_rank

    @override
    def candidates(self, context: SearchContext) -> Iterator[None]:
        landscape, start = context.landscape, context.start
        level_set = LevelSet(start.gradients, context.invariance)
        origin = landscape.position()
        value, gradient = context.objective.value_and_gradient(landscape, start)
        tangent = step = level_set.tangent(gradient)
        # Where the objective changes with the held losses alone, what is left is rounding, and no direction.
        if not tangent.norm() > 100 * torch.finfo(tangent.dtype).eps * gradient.norm():
            return
        scale = landscape.norm()
        if not self.full_rank:
            assert isinstance(context.adapter, LoraConfig)
            targets = matrix_parameters(context.modules, landscape.shared, context.adapter)
            step = low_rank(step, landscape.shared, targets, context.adapter.r)
            scale = norm_of(targets)
        length = step.norm()
        if not length > 0:
            return
        reach = self.size * scale
        if value is not None:
            slope = float(tangent @ step / length)
            if not slope > 0:
                return
            reach = min(reach, (context.objective.aim(value) - value) / slope)
        reach /= float(length)
        for _ in range(1 + self.backtracks):
            landscape.move_to(origin)
            landscape.move_by(step, reach)
            losses = landscape.losses()
            context.record("step", losses=losses, drift=drift(losses, start.losses, context.invariance))
            landscape.move_by(level_set.retraction(losses - start.losses))
            yield
            reach *= self.shrink

    @override
    def reach(
        self, modules: Sequence[tuple[str, nn.Module]], shared: Sequence[Parameter], adapter: PeftConfig
    ) -> Sequence[Parameter]:
        if self.full_rank:
            return shared
        if not isinstance(adapter, LoraConfig):
            raise ValueError(
                "`adapter` must be a peft.LoraConfig for the level set search, whose adapter is the best approximation"
                f" of a given rank; got {type(adapter).__name__}. Use `search='penalty'` with it."
            )
        reached = matrix_parameters(modules, shared, adapter)
        if not reached:
            raise ValueError(unreachable_message(adapter))
        return reached

    def __repr__(self) -> str:
        return (
            f"LevelSetSearch(size={self.size}, steps={self.rounds}, backtracks={self.backtracks},"
            f" shrink={self.shrink}, full_rank={self.full_rank})"
        )
