"""What triggers, objectives, searches and schedules of a user return: what cannot be used gets an error by name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import LoraConfig
from torch.nn import Parameter

from lightning_cost import (
    ConflictAlignment,
    LevelSetSearch,
    PenaltySearch,
    RandomDirection,
    Reversed,
    Search,
    SymmetryTeleportCallback,
)
from tests.support.nets import Net, fit, make_batches
from tests.support.teleporting import always, teleporter

CONFIG = MisconfigurationException
PENALTY = PenaltySearch(steps=1)


def trained(**settings: Any) -> list[Any]:
    callback = teleporter(**settings)
    fit(Net(), make_batches(1), callbacks=[callback])
    return callback.reports


class Climbs(ConflictAlignment):
    """Changes what :class:`ConflictAlignment` returns."""

    def __init__(self, change: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.change = change

    def value_and_gradient(self, surface: Any, point: Any) -> Any:
        return self.change(*super().value_and_gradient(surface, point))


class Aims(ConflictAlignment):
    """Aims at what it is given."""

    def __init__(self, aim: Any) -> None:
        super().__init__()
        self.wrong = aim

    def aim(self, value: float) -> Any:
        return self.wrong


class Values(RandomDirection):
    """Has the value that it is given."""

    def __init__(self, value: Any) -> None:
        self.wrong = value

    def value(self, surface: Any, point: Any) -> Any:
        return self.wrong


class Reaches(Search):
    """Reaches what it is given."""

    def __init__(self, reach: Callable[[Any], Any]) -> None:
        self.reached = reach

    def candidates(self, context: Any) -> Any:
        return iter(())

    def reach(self, modules: Any, shared: Any) -> Any:
        return self.reached(shared)


def converted(change: Callable[[Any], Any]) -> Climbs:
    return Climbs(lambda value, gradient: (value, change(gradient)))


def with_attribute(instance: Any, name: str, value: Any) -> Any:
    setattr(instance, name, value)
    return instance


ROWS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    # ----------------------------------------------------------------------------------------------------- triggers
    "a trigger without an argument": (
        lambda: SymmetryTeleportCallback(trigger=lambda: True),
        ValueError,
        r"`trigger` must be a function of TaskGradients, with one argument; got .*\(\)",
    ),
    "a trigger of two arguments": (
        lambda: SymmetryTeleportCallback(trigger=lambda gradients, step: True),
        ValueError,
        r"`trigger` must be .* with one argument; got .*\(gradients, step\)",
    ),
    "a trigger that returns NaN": (
        lambda: trained(trigger=lambda gradients: math.nan),
        TypeError,
        "`trigger` must return True or False; got nan",
    ),
    # --------------------------------------------------------------------------------------------------- objectives
    "a gradient of integers": (
        lambda: trained(objective=converted(torch.Tensor.long)),
        TypeError,
        "`gradient of Climbs.value_and_gradient` must be a dense tensor of torch.float32 on cpu; got .*torch.int64",
    ),
    "a gradient in double precision": (
        lambda: trained(objective=converted(torch.Tensor.double)),
        TypeError,
        "`gradient of Climbs.value_and_gradient` must be .*torch.float64 on cpu. Convert it",
    ),
    "a gradient in half precision": (
        lambda: trained(objective=converted(torch.Tensor.half)),
        TypeError,
        "`gradient of Climbs.value_and_gradient` must be .*torch.float16",
    ),
    "a complex gradient": (
        lambda: trained(objective=converted(lambda gradient: gradient * 1j)),
        TypeError,
        "`gradient of Climbs.value_and_gradient` must be .*torch.complex64",
    ),
    "a gradient on another device": (
        lambda: trained(objective=converted(lambda gradient: gradient.to("meta"))),
        TypeError,
        "`gradient of Climbs.value_and_gradient` must be .* on cpu; got .* on meta",
    ),
    "a sparse gradient": (
        lambda: trained(objective=converted(torch.Tensor.to_sparse)),
        TypeError,
        "`gradient of Climbs.value_and_gradient` must be a dense tensor.*torch.sparse_coo",
    ),
    "a gradient of integers in a penalty": (
        lambda: trained(objective=converted(torch.Tensor.long), search=PENALTY),
        TypeError,
        "`gradient of Climbs.value_and_gradient` must be .*torch.int64",
    ),
    "an aim of text": (lambda: trained(objective=Aims("high")), TypeError, "`Aims.aim` must return a number.*'high'"),
    "no aim": (lambda: trained(objective=Aims(None)), TypeError, "`Aims.aim` must return a number, or infinity.*None"),
    "an aim of NaN": (lambda: trained(objective=Aims(math.nan)), TypeError, "`Aims.aim` must return a number.*got nan"),
    "an aim that is a vector": (
        lambda: trained(objective=Aims(torch.ones(2))),
        TypeError,
        r"`Aims.aim` must return a number.*a tensor of shape \(2,\)",
    ),
    "Reversed: a value of text": (
        lambda: trained(objective=Reversed(Values("large"))),
        TypeError,
        "`Values.value` must return a number or None; got 'large'",
    ),
    "Reversed: no gradient": (
        lambda: trained(objective=Reversed(Climbs(lambda value, gradient: None))),
        TypeError,
        "`Climbs.value_and_gradient` must return a value and a gradient; got None",
    ),
    "Reversed: a gradient that is a list": (
        lambda: trained(objective=Reversed(converted(torch.Tensor.tolist))),
        TypeError,
        "`Climbs.value_and_gradient` must return a gradient of shape .*a list",
    ),
    "Reversed: an aim of text": (
        lambda: trained(objective=Reversed(Aims("high"))),
        TypeError,
        "`Aims.aim` must return a number.*'high'",
    ),
    "Reversed: a target without effect": (
        lambda: SymmetryTeleportCallback(search="penalty", objective=Reversed(ConflictAlignment(target=0.5))),
        ValueError,
        "`target=0.5` has no effect with PenaltySearch",
    ),
    "uses_task_gradients: text": (
        lambda: teleporter(objective=with_attribute(RandomDirection(), "uses_task_gradients", "no")),
        ValueError,
        "`RandomDirection.uses_task_gradients` must be True or False; got 'no'",
    ),
    # ----------------------------------------------------------------------------------------------------- searches
    "rounds: text": (
        lambda: teleporter(search=with_attribute(LevelSetSearch(), "rounds", "3")),
        ValueError,
        "`LevelSetSearch.rounds` must be an integer of at least 0; got '3'",
    ),
    "uses_aim: text": (
        lambda: teleporter(search=with_attribute(LevelSetSearch(), "uses_aim", "no")),
        ValueError,
        "`LevelSetSearch.uses_aim` must be True or False; got 'no'",
    ),
    "a reach of no parameter": (
        lambda: trained(search=Reaches(lambda shared: [])),
        CONFIG,
        r"`Reaches.reach` must return some of the shared parameters; got \[\]. Raise a ValueError",
    ),
    "a reach of other parameters": (
        lambda: trained(search=Reaches(lambda shared: [Parameter(torch.ones(2))])),
        CONFIG,
        "`Reaches.reach` must return some of the shared parameters",
    ),
    "a target without weights": (
        lambda: trained(search=LevelSetSearch(target_modules=["backbone.0", "backbone.1"])),
        CONFIG,
        "`target_modules` names 'backbone.1', but no shared module has this name and weights of its own",
    ),
    "a target that is a container": (
        lambda: trained(search=LevelSetSearch(target_modules=["backbone", "backbone.0"])),
        CONFIG,
        "`target_modules` names 'backbone', but no shared module has this name and weights of its own",
    ),
    "adapter.exclude_modules: a typo": (
        lambda: trained(search=PenaltySearch(LoraConfig(r=2, exclude_modules=["bakbone.0"]), steps=1)),
        CONFIG,
        "`exclude_modules` names 'bakbone.0', but no shared module has this name.*Did you mean 'backbone.0'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ROWS.values(), ids=ROWS)
def test_bad_input_is_named(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_the_reason_of_a_refusal(factor: float) -> None:
    """No error: a built-in objective may overflow too, and a teleport that fails changes nothing."""
    (report,) = trained(objective=converted(lambda gradient: gradient * factor))
    assert not report.accepted
    assert report.reason == "the gradient of Climbs is not finite"
    (report,) = trained(objective=converted(lambda gradient: gradient * factor), search=PENALTY)
    assert report.reason == "the adapter is not finite after 1 steps"


def test_a_gradient_with_a_graph_is_used_without_it() -> None:
    (plain,) = trained(objective=converted(torch.Tensor.clone))
    (report,) = trained(objective=converted(lambda gradient: gradient.clone().requires_grad_()))
    assert plain.accepted
    assert report.accepted
    assert report.cosines_after == plain.cosines_after


class OwnSchedule(SymmetryTeleportCallback):
    def should_check(self, trainer: Any, pl_module: Any) -> bool:
        return True


class BothSchedules(SymmetryTeleportCallback):
    def should_check(self, trainer: Any, pl_module: Any) -> bool:
        return super().should_check(trainer, pl_module)


class ReadsSchedule(SymmetryTeleportCallback):
    def should_check(self, trainer: Any, pl_module: Any) -> bool:
        return trainer.current_epoch >= self.schedule.start_epoch


@pytest.mark.parametrize("name", ["start_epoch", "max_per_epoch", "check_every_n_steps"])
def test_a_schedule_that_is_overridden_is_said_to_have_no_effect(name: str) -> None:
    with pytest.warns(UserWarning, match=rf"(?s)OwnSchedule overrides `should_check`.*{name}=7.*has no effect"):
        fit(Net(), make_batches(1), callbacks=[OwnSchedule(**{name: 7}, trigger=always)])


@pytest.mark.parametrize("callback", [OwnSchedule(), BothSchedules(start_epoch=0), ReadsSchedule(start_epoch=0)])
def test_a_schedule_that_is_used_is_accepted(callback: SymmetryTeleportCallback) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*should_check")
        fit(Net(), make_batches(1), callbacks=[callback])
