"""What studies compare with a method alone, by name: settings of COST, and options of the mixin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

from lightning.pytorch.callbacks import Callback
from peft import LoHaConfig, LoKrConfig, LoraConfig

from lightning_cost import LevelSetSearch, PenaltySearch, SymmetryTeleportCallback
from lightning_cost.objectives import ConflictAlignment, GradientNorm, RandomDirection, Reversed, SampledSharpness
from lightning_cost.triggers import Majority
from recipes.common.problem import Problem
from recipes.study.experimental import (
    CosineBelow,
    EpochTeleportCallback,
    LookAhead,
    LookAheadCallback,
    LowestCosines,
    OptionsOfMixin,
    RunningDirection,
    SmoothedTrigger,
)
from recipes.study.problem import import_object

__all__ = ["CALLBACKS", "SWEPT", "make_callback"]

Factory = Callable[[Problem, int], Callback]


def _cost(**settings: Any) -> Factory:
    # Objectives and triggers have a state that must not be shared between runs.
    return lambda problem, seed: SymmetryTeleportCallback(seed=seed, **deepcopy(settings))


def _paper(**settings: Any) -> Factory:
    return lambda problem, seed: SymmetryTeleportCallback.paper(
        start_epoch=max(1, problem.epochs // 4), seed=seed, **deepcopy(settings)
    )


def _swept(
    gamma: float = 0.1, samples: int = 5, radius: float = 0.05, steps: int = 30, rank: int = 5, **settings: Any
) -> Factory:
    """The paper's method at every tenth step instead of once an epoch, so that there is something to see."""
    search = PenaltySearch(LoraConfig(r=rank), steps=steps, gamma=gamma, relative=False)
    objective = SampledSharpness("loss", samples, radius)
    settings = {"search": search, "objective": objective, "max_per_epoch": None, "check_every_n_steps": 10, **settings}
    return _paper(**settings)


# What the paper leaves open, or does not vary: one setting at a time.
SWEPT: dict[str, Factory] = {
    "paper's": _swept(),
    **{f"paper's, gamma {gamma}": _swept(gamma=gamma) for gamma in (0.01, 1.0)},
    **{f"paper's, {steps} steps": _swept(steps=steps) for steps in (10, 100)},
    **{f"paper's, {samples} samples": _swept(samples=samples) for samples in (1, 20)},
    **{f"paper's, radius {radius}": _swept(radius=radius) for radius in (0.005, 0.5)},
    **{f"paper's, rank {rank}": _swept(rank=rank) for rank in (1, 20)},
}


def _during(epochs: Callable[[Problem], Iterable[int]], **settings: Any) -> Factory:
    def make(problem: Problem, seed: int) -> SymmetryTeleportCallback:
        chosen = sorted(epoch for epoch in epochs(problem) if epoch < problem.epochs)
        if not chosen:
            raise ValueError(
                f"The problem {problem.title!r} has no epoch to teleport in: it has {problem.epochs} epochs, and the"
                f" learning rate drops before epochs {list(_drops(problem))}. Train longer, or leave out this callback."
            )
        return EpochTeleportCallback(chosen, seed=seed, **deepcopy(settings))

    return make


def _third(index: int) -> Callable[[Problem], Iterable[int]]:
    return lambda problem: range(problem.epochs * index // 3, problem.epochs * (index + 1) // 3)


def _drops(problem: Problem) -> Iterable[int]:
    return getattr(problem, "lr_milestones", ())


def _options(**options: Any) -> Factory:
    return lambda problem, seed: OptionsOfMixin(**options)


CALLBACKS: dict[str, Factory] = {
    "COST": _cost(),
    # A third of the price.
    "deferred": _cost(reevaluate=False),
    "deferred, every 4": _cost(reevaluate=False, check_every_n_steps=4),
    "deferred, both terms": _cost(reevaluate=False, objective=ConflictAlignment()),
    "deferred, random direction": _cost(reevaluate=False, objective=RandomDirection()),
    "deferred, reversed direction": _cost(reevaluate=False, objective=Reversed(ConflictAlignment(terms="mean"))),
    "mean term": _cost(objective=ConflictAlignment(terms="mean")),
    # Cheaper aggregators.
    "features": _options(task_gradients_of="features"),
    **{f"weights every {n}": _options(weights_every=n) for n in (2, 10)},
    # Controls.
    "random direction": _cost(objective=RandomDirection()),
    "reversed direction": _cost(objective=Reversed(ConflictAlignment())),
    # The paper and its parts (Table 4): loss invariance, gradient maximization, historical trajectory reuse.
    "paper": _paper(),
    "L_t": _paper(search=PenaltySearch(gamma=0.0, relative=False), history="keep"),
    "L_g": _paper(search=PenaltySearch(gamma=0.1, invariance_weight=0.0), history="keep"),
    "L_t + L_g": _paper(history="keep"),
    **SWEPT,
    # Searches.
    "full rank": _cost(search=LevelSetSearch(full_rank=True)),
    "2 steps": _cost(search=LevelSetSearch(steps=2)),
    "4 full steps, every 4": _cost(search=LevelSetSearch(steps=4, full_rank=True), check_every_n_steps=4),
    "penalty search": _cost(search=PenaltySearch(steps=20, lr=1e-3), max_per_epoch=1),
    # Objectives.
    "gradient norm": _cost(objective="gradient_norm"),
    "sharpness": _cost(objective="sharpness"),
    "flatter": _cost(objective=Reversed(GradientNorm())),
    "look ahead": lambda problem, seed: LookAheadCallback(LookAhead(), seed=seed),
    "running direction": _cost(objective=RunningDirection(decay=0.5)),
    "running direction, every 2": _cost(objective=RunningDirection(decay=0.7, every=2)),
    "running direction, every 4": _cost(objective=RunningDirection(decay=0.7, every=4)),
    # History.
    "history momentum": _cost(history="momentum"),
    "history paper": _cost(history="paper"),
    "history reset": _cost(history="reset"),
    # Rank and interval.
    **{f"rank {rank}": _cost(search=LevelSetSearch(rank=rank)) for rank in (1, 2, 10)},
    **{f"every {interval} steps": _cost(check_every_n_steps=interval) for interval in (2, 4, 8)},
    "every 2 steps, random direction": _cost(check_every_n_steps=2, objective=RandomDirection()),
    "every 2 steps, reversed direction": _cost(check_every_n_steps=2, objective=Reversed(ConflictAlignment())),
    "once an epoch": _cost(max_per_epoch=1),
    # Triggers (Table 7, Fig. 10).
    "any": _cost(trigger="any"),
    "weak": _cost(trigger="weak"),
    **{f"majority {share}": _cost(trigger=Majority(share)) for share in (0.5, 0.3, 0.15)},
    "running mean": _cost(trigger=SmoothedTrigger()),
    # A threshold that follows training, and fixed ones.
    **{f"lowest {share:.0%}": _cost(trigger=LowestCosines(share)) for share in (0.05, 0.1, 0.2)},
    **{f"cosine below {threshold}": _cost(trigger=CosineBelow(threshold)) for threshold in (-0.1, -0.2, -0.3, -0.5)},
    # Adapters of the penalty search (Table 8).
    **{
        f"{name} adapter": _cost(search=PenaltySearch(adapter, steps=20, lr=1e-3), max_per_epoch=1)
        for name, adapter in (("LoRA", LoraConfig(r=5)), ("LoHa", LoHaConfig(r=5)), ("LoKr", LoKrConfig(r=5)))
    },
    # Times.
    "from the start": _cost(start_epoch=0),
    "first third": _during(_third(0)),
    "middle third": _during(_third(1)),
    "last third": _during(_third(2)),
    "last third, flatter": _during(_third(2), objective=Reversed(GradientNorm())),
    # In the two epochs after each drop of the learning rate.
    "after drops": _during(lambda problem: {drop + later for drop in _drops(problem) for later in (0, 1)}),
}
"""Name to a function that makes a fresh callback for a problem and a seed."""


def make_callback(name: str, problem: Problem, seed: int) -> Callback:
    """Make a fresh callback for a problem and a seed.

    `name` is one of `CALLBACKS`, or `package.module:NAME` of a function of a problem and a seed.

    Raises:
        ValueError: If there is no such callback, or it does not fit the problem.
    """
    if ":" not in name and name not in CALLBACKS:
        raise ValueError(f"A callback must be one of {list(CALLBACKS)} or package.module:NAME; got {name!r}.")
    made = (import_object(name) if ":" in name else CALLBACKS[name])(problem, seed)
    if not isinstance(made, Callback):
        raise ValueError(f"The callback {name!r} must be a Callback, such as SymmetryTeleportCallback; got {made!r}.")
    return made
