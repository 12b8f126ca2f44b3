"""The settings of COST that studies compare, by name."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig

from lightning_cost import LevelSetSearch, PenaltySearch, SymmetryTeleportCallback
from lightning_cost.objectives import ConflictAlignment, GradientNorm, RandomDirection, Reversed
from lightning_cost.triggers import Majority
from recipes.study.experimental import EpochTeleportCallback, LookAhead, RunningDirection, SmoothedTrigger
from recipes.study.problem import Problem, import_object

__all__ = ["CALLBACKS", "make_callback"]

Factory = Callable[[Problem], SymmetryTeleportCallback]


def _cost(**settings: Any) -> Factory:
    # Objectives and triggers have state, which belongs to one run.
    return lambda problem: SymmetryTeleportCallback(**deepcopy(settings))


def _paper(**settings: Any) -> Factory:
    return lambda problem: SymmetryTeleportCallback.paper(start_epoch=max(1, problem.epochs // 4), **deepcopy(settings))


def _third(index: int, **settings: Any) -> Factory:
    def make(problem: Problem) -> SymmetryTeleportCallback:
        first, end = (problem.epochs * part // 3 for part in (index, index + 1))
        return EpochTeleportCallback(range(first, end), **deepcopy(settings))

    return make


def _after_drops(problem: Problem) -> SymmetryTeleportCallback:
    """In the two epochs after each drop of the learning rate."""
    drops = getattr(problem, "lr_milestones", ())
    if not drops:
        raise ValueError(f"The problem {problem.title!r} has no `lr_milestones` to teleport after.")
    return EpochTeleportCallback({drop + offset for drop in drops for offset in (0, 1)})


CALLBACKS: dict[str, Factory] = {
    "COST": _cost(),
    # Controls.
    "random direction": _cost(objective=RandomDirection()),
    "reversed direction": _cost(objective=Reversed(ConflictAlignment())),
    # The paper, and its parts (Table 4): loss invariance, gradient maximization, historical trajectory reuse.
    "paper": _paper(),
    "L_t": _paper(search=PenaltySearch(gamma=0.0, relative=False), history="keep"),
    "L_g": _paper(search=PenaltySearch(gamma=0.1, relative=False, invariance_weight=0.0), history="keep"),
    "L_t + L_g": _paper(history="keep"),
    # Searches.
    "full rank": _cost(search=LevelSetSearch(full_rank=True)),
    "2 steps": _cost(search=LevelSetSearch(steps=2)),
    "penalty search": _cost(search=PenaltySearch(steps=20, lr=1e-3), max_per_epoch=1),
    # Objectives.
    "gradient norm": _cost(objective="gradient_norm"),
    "sharpness": _cost(objective="sharpness"),
    "flatter": _cost(objective=Reversed(GradientNorm())),
    "look ahead": _cost(objective=LookAhead()),
    "running direction": _cost(objective=RunningDirection(ConflictAlignment(), decay=0.5)),
    **{
        f"running direction, every {every}": _cost(objective=RunningDirection(ConflictAlignment(), 0.7, every))
        for every in (2, 4)
    },
    # History.
    "history momentum": _cost(history="momentum"),
    "history paper": _cost(history="paper"),
    "history reset": _cost(history="reset"),
    # Rank, batches, interval.
    **{f"rank {rank}": _cost(adapter=LoraConfig(r=rank)) for rank in (1, 2, 10)},
    **{f"{count} batches": _cost(num_batches=count) for count in (2, 4)},
    **{f"every {interval} steps": _cost(check_every_n_steps=interval) for interval in (2, 4, 8)},
    "once an epoch": _cost(max_per_epoch=1),
    # Triggers (Table 7, Fig. 10).
    "any": _cost(trigger="any"),
    "weak": _cost(trigger="weak"),
    **{f"majority {share}": _cost(trigger=Majority(share)) for share in (0.5, 0.3, 0.15)},
    "running mean": _cost(trigger=SmoothedTrigger()),
    # Adapters of the penalty search (Table 8).
    **{
        f"{name} adapter": _cost(search=PenaltySearch(steps=20, lr=1e-3), adapter=adapter, max_per_epoch=1)
        for name, adapter in (("LoRA", LoraConfig(r=5)), ("LoHa", LoHaConfig(r=5)), ("LoKr", LoKrConfig(r=5)))
    },
    # Times.
    "from the start": _cost(start_epoch=0),
    "first third": _third(0),
    "middle third": _third(1),
    "last third": _third(2),
    "last third, flatter": _third(2, objective=Reversed(GradientNorm())),
    "after drops": _after_drops,
}
"""Name to what makes a fresh callback for a problem."""


def make_callback(name: str, problem: Problem) -> SymmetryTeleportCallback:
    """A fresh callback.

    Args:
        name: One of `CALLBACKS`, or `package.module:NAME` of a function of the problem that returns one.
        problem: The problem that it is for.

    Raises:
        ValueError: If there is no such callback.
    """
    if ":" in name:
        return import_object(name)(problem)
    if name not in CALLBACKS:
        raise ValueError(f"A callback must be one of {list(CALLBACKS)} or package.module:NAME; got {name!r}.")
    return CALLBACKS[name](problem)
