"""Bad input to the library: each kind gets an error that names the argument or the task, and says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import LoraConfig
from torch import Tensor
from torch.nn import Parameter
from torchjd.aggregation import NashMTL, UPGrad

from lightning_cost import (
    ConflictAlignment,
    GradientNorm,
    LevelSetSearch,
    Majority,
    PenaltySearch,
    SampledSharpness,
    Search,
    Surface,
    SymmetryTeleportCallback,
)
from lightning_cost.objectives import Reversed
from lightning_cost.triggers import Schedule
from tests.support.nets import Net, fit, make_batches
from tests.support.teleporting import teleporter

Callback = SymmetryTeleportCallback
CONFIG = MisconfigurationException
ONES, PIXELS = torch.ones(2, 3), torch.ones(2, 3, 2)


def trained(module: Any = None, **settings: Any) -> None:
    fit(Net() if module is None else module, make_batches(2), callbacks=[teleporter(**settings)])


def with_losses(change: Callable[[dict[str, Tensor]], Any]) -> Net:
    class Changed(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            return change(self.losses(batch))

    return Changed()


def with_attribute(name: str, value: Any, mtl_method: Any = None) -> Net:
    module = Net(mtl_method)
    setattr(module, name, value)
    return module


class Checks(SymmetryTeleportCallback):
    """Decides by what it is given."""

    answer: Any = None

    def should_check(self, trainer: Any, pl_module: Any) -> Any:
        return self.answer


def checks(answer: Any, **settings: Any) -> Checks:
    callback = Checks(trigger=lambda gradients: True, **settings)
    callback.answer = answer
    return callback


class Valued(ConflictAlignment):
    """Returns what it is given."""

    def __init__(self, value: Any = None, gradient: Any = None) -> None:
        super().__init__()
        self.wrong_value, self.wrong_gradient = value, gradient

    def value(self, surface: Any, point: Any) -> Any:
        return super().value(surface, point) if self.wrong_value is None else self.wrong_value

    def value_and_gradient(self, surface: Any, point: Any) -> Any:
        value, gradient = super().value_and_gradient(surface, point)
        return value, gradient if self.wrong_gradient is None else self.wrong_gradient(gradient)


class Searching(Search):
    """Returns what it is given."""

    def __init__(self, candidates: Any = None, reach: Any = lambda shared: shared) -> None:
        self.found, self.reached = candidates, reach

    def candidates(self, context: Any) -> Any:
        return self.found

    def reach(self, modules: Any, shared: Any) -> Any:
        return self.reached(shared)


def surface(**changed: Any) -> Surface:
    weight = Parameter(torch.ones(2))
    settings = {"batches": lambda: {"left": weight.sum(), "right": weight.square().sum()}, "shared": [weight]}
    return Surface(**{**settings, **changed})


GRADIENTS = ["left", "right"], torch.eye(2)

ROWS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    # ------------------------------------------------------------------------------------------------- the callback
    "trigger: unknown name": (
        lambda: Callback(trigger="dominate"),
        ValueError,
        "`trigger` must be one of .*'dominate'",
    ),
    "trigger: class": (lambda: Callback(trigger=Majority), ValueError, "`trigger` must be a function.*not a class"),
    "trigger: number": (lambda: Callback(trigger=0.5), ValueError, "`trigger` must be one of"),
    "trigger returns a vector": (
        lambda: trained(trigger=lambda gradients: gradients.cosines < 0),
        TypeError,
        r"`trigger` must return True or False.*shape \(3,\).*any\(\)",
    ),
    "trigger returns nothing": (lambda: trained(trigger=lambda g: None), TypeError, "`trigger` must return.*got None"),
    "trigger returns a string": (lambda: trained(trigger=lambda g: "yes"), TypeError, "`trigger` must return.*'yes'"),
    "trigger returns a number": (lambda: trained(trigger=lambda g: 0.3), TypeError, "`trigger` must return.*got 0.3"),
    "objective: unknown name": (lambda: Callback(objective="norm"), ValueError, "`objective` must be one of .*'norm'"),
    "objective: class": (lambda: Callback(objective=GradientNorm), ValueError, "`objective` must be one of"),
    "search: unknown name": (lambda: Callback(search="lora"), ValueError, "`search` must be one of .*'lora'"),
    "search: class": (lambda: Callback(search=LevelSetSearch), ValueError, "`search` must be one of"),
    "start_epoch: negative": (lambda: Callback(start_epoch=-1), ValueError, "`start_epoch` must be an integer of at"),
    "start_epoch: fraction": (lambda: Callback(start_epoch=0.25), ValueError, "`start_epoch` must be an integer"),
    "max_per_epoch: zero": (lambda: Callback(max_per_epoch=0), ValueError, "`max_per_epoch` must be .*at least 1"),
    "check_every_n_steps: bool": (lambda: Callback(check_every_n_steps=True), ValueError, "`check_every_n_steps` must"),
    "tolerance: NaN": (lambda: Callback(tolerance=math.nan), ValueError, "`tolerance` must be a positive number"),
    "tolerance: infinite": (lambda: Callback(tolerance=math.inf), ValueError, "`tolerance` must be a positive number"),
    "tolerance: text": (
        lambda: Callback(tolerance="2%"),
        ValueError,
        "`tolerance` must be a positive number; got '2%'",
    ),
    "invariance: unknown": (lambda: Callback(invariance="sum"), ValueError, "`invariance` must be one of .*'sum'"),
    "history: unknown": (lambda: Callback(history="drop"), ValueError, "`history` must be one of .*'drop'"),
    "unrepeatable: unknown": (lambda: Callback(unrepeatable="warn"), ValueError, "`unrepeatable` must be one of"),
    "seed: text": (lambda: Callback(seed="0"), ValueError, "`seed` must be an integer"),
    "seed: too large": (
        lambda: Callback(seed=2**70),
        ValueError,
        r"`seed` must be an integer from .*got 1180591620717",
    ),
    "check_ranks: number": (lambda: Callback(check_ranks=1), ValueError, "`check_ranks` must be True or False; got 1"),
    "paper: unknown argument": (lambda: Callback.paper(gama=0.1), TypeError, "gama"),
    "should_check returns nothing": (
        lambda: fit(Net(), make_batches(2), callbacks=[checks(None)]),
        TypeError,
        "`should_check` must return True or False; got None",
    ),
    "should_check returns a vector": (
        lambda: fit(Net(), make_batches(2), callbacks=[checks(torch.ones(2))]),
        TypeError,
        r"`should_check` must return True or False; got a tensor of shape \(2,\)",
    ),
    "the module is none of ours": (
        lambda: teleporter().setup(None, torch.nn.Linear(1, 1), "fit"),
        CONFIG,
        "needs a module that subclasses MultiTaskMixin; Linear",
    ),
    # -------------------------------------------------------------------------------------- triggers and the schedule
    "Majority: share of 0": (lambda: Majority(0), ValueError, r"`share` must be in \(0, 1\]; got 0"),
    "Majority: text": (lambda: Majority("half"), ValueError, r"`share` must be in \(0, 1\]; got 'half'"),
    "Schedule: text": (lambda: Schedule(start_epoch="1"), ValueError, "`start_epoch` must be an integer"),
    # ---------------------------------------------------------------------------------------------------- objectives
    "derivative: unknown": (lambda: ConflictAlignment("exact"), ValueError, "`derivative` must be one of .*'exact'"),
    "epsilon: zero": (lambda: GradientNorm(epsilon=0), ValueError, "`epsilon` must be a positive number; got 0"),
    "terms: unknown": (lambda: ConflictAlignment(terms="task"), ValueError, "`terms` must be one of .*'task'"),
    "target: out of range": (lambda: ConflictAlignment(target=2), ValueError, r"`target` must be in \(-1, 1\]; got 2"),
    "target: text": (lambda: ConflictAlignment(target="x"), ValueError, r"`target` must be in \(-1, 1\]; got 'x'"),
    "form: unknown": (lambda: SampledSharpness(form="eq8"), ValueError, "`form` must be 'loss'"),
    "samples: zero": (lambda: SampledSharpness(samples=0), ValueError, "`samples` must be an integer of at least 1"),
    "radius: negative": (lambda: SampledSharpness(radius=-1), ValueError, "`radius` must be a positive number; got -1"),
    "Reversed: a name": (lambda: Reversed("conflict"), (TypeError, ValueError), "`objective` must be"),
    "objective returns text": (
        lambda: trained(objective=Valued("large")),
        TypeError,
        "`Valued.value` must return a number or None; got 'large'",
    ),
    "objective returns a vector": (
        lambda: trained(objective=Valued(torch.ones(2))),
        TypeError,
        r"`Valued.value` must return a number or None; got a tensor of shape \(2,\)",
    ),
    "gradient of a wrong shape": (
        lambda: trained(objective=Valued(gradient=lambda gradient: gradient[:3])),
        TypeError,
        r"`Valued.value_and_gradient` must return a gradient of shape \(64,\); got a tensor of shape \(3,\)",
    ),
    "gradient is no tensor": (
        lambda: trained(objective=Valued(gradient=lambda gradient: gradient.tolist())),
        TypeError,
        r"`Valued.value_and_gradient` must return a gradient of shape \(64,\); got a list",
    ),
    # ------------------------------------------------------------------------------------------------------ searches
    "rank: zero": (lambda: LevelSetSearch(rank=0), ValueError, "`rank` must be an integer of at least 1; got 0"),
    "full_rank: number": (lambda: LevelSetSearch(full_rank=1), ValueError, "`full_rank` must be True or False; got 1"),
    "rank without effect": (lambda: LevelSetSearch(rank=2, full_rank=True), ValueError, "`rank=2` has no effect"),
    "size: negative": (lambda: LevelSetSearch(size=-0.1), ValueError, "`size` must be a positive number"),
    "shrink: one": (lambda: LevelSetSearch(shrink=1), ValueError, "`shrink` must be between 0 and 1; got 1"),
    "target_modules: broken expression": (
        lambda: LevelSetSearch(target_modules="backbone.["),
        ValueError,
        "`target_modules` must be .*no regular expression",
    ),
    "target_modules: empty": (
        lambda: LevelSetSearch(target_modules=[]),
        ValueError,
        r"`target_modules` must be .*\[\]",
    ),
    "target_modules: a typo beside a right name": (
        lambda: trained(search=LevelSetSearch(target_modules=["backbone.0", "backbon.2"])),
        CONFIG,
        r"`target_modules` names 'backbon.2', but no shared module has this name.*Did you mean 'backbone.2'",
    ),
    "adapter.target_modules: a typo": (
        lambda: trained(search=PenaltySearch(LoraConfig(r=2, target_modules=["backbone.0", "bakbone.2"]), steps=1)),
        CONFIG,
        r"`target_modules` names 'bakbone.2', but no shared module has this name.*Did you mean 'backbone.2'",
    ),
    "adapter: a number": (lambda: PenaltySearch(adapter=5), ValueError, "`adapter` must be a peft.LoraConfig.*got 5"),
    "adapter: dropout": (
        lambda: PenaltySearch(LoraConfig(lora_dropout=0.1)),
        ValueError,
        "`adapter` must not use dropout.*lora_dropout=0.1",
    ),
    "adapter: task_type": (
        lambda: PenaltySearch(LoraConfig(task_type="CAUSAL_LM")),
        ValueError,
        "`adapter.task_type='CAUSAL_LM'` has no effect",
    ),
    "gamma: negative": (lambda: PenaltySearch(gamma=-1), ValueError, "`gamma` must be a number of at least 0; got -1"),
    "lr: zero": (lambda: PenaltySearch(lr=0), ValueError, "`lr` must be a positive number; got 0"),
    "target without effect": (
        lambda: Callback(search="penalty", objective=ConflictAlignment(target=0.5)),
        ValueError,
        "`target=0.5` has no effect with PenaltySearch",
    ),
    "candidates of nothing": (
        lambda: trained(search=Searching()),
        TypeError,
        "`Searching.candidates` must yield at each candidate; got None",
    ),
    "reach of nothing": (
        lambda: trained(search=Searching(reach=lambda shared: None)),
        (TypeError, CONFIG),
        "`Searching.reach` must return .* shared parameters; got None",
    ),
    # --------------------------------------------------------------------------------------------------- the module
    "task_losses: a list": (
        lambda: fit(with_losses(list), make_batches(1)),
        TypeError,
        "`task_losses` must return a dic",
    ),
    "a loss that is a vector": (
        lambda: fit(with_losses(lambda losses: losses | {"ink": losses["ink"].expand(2)}), make_batches(1)),
        ValueError,
        r"loss of task 'ink' must be a scalar tensor.*\(2,\). Reduce it",
    ),
    "a detached loss": (
        lambda: fit(with_losses(lambda losses: losses | {"ink": losses["ink"].detach()}), make_batches(1)),
        ValueError,
        "loss of task 'ink' has no graph.*return None",
    ),
    "a complex loss": (
        lambda: fit(with_losses(lambda losses: losses | {"ink": losses["ink"] * 1j}), make_batches(1)),
        ValueError,
        "loss of task 'ink' must be a floating-point number; got torch.complex64",
    ),
    "a loss that is NaN": (
        lambda: fit(with_losses(lambda losses: losses | {"ink": losses["ink"] * math.nan}), make_batches(1)),
        ValueError,
        "loss of task 'ink' is not finite",
    ),
    "no task at all": (lambda: fit(with_losses(lambda losses: {}), make_batches(1)), ValueError, "returned no task"),
    "a single task": (
        lambda: trained(with_losses(lambda losses: {"ink": losses["ink"]})),
        CONFIG,
        "needs at least 2 tasks; `task_losses` returned 'ink'",
    ),
    "a method for two tasks": (
        lambda: fit(Net(NashMTL(2)), make_batches(1)),
        CONFIG,
        r"does not work with the 3 tasks.*Set its option `n_tasks`",
    ),
    "a method that is a class": (
        lambda: fit(with_attribute("mtl_method", UPGrad), make_batches(1)),
        CONFIG,
        "`mtl_method` must be a torchjd.aggregation.Aggregator.*got <class",
    ),
    "reduce_dtype: text": (
        lambda: fit(with_attribute("reduce_dtype", "bf16"), make_batches(1)),
        CONFIG,
        "`reduce_dtype` of Net must be a floating torch.dtype.*'bf16'",
    ),
    "shared_module: unknown": (
        lambda: fit(with_attribute("shared_module", "trunk", UPGrad()), make_batches(1)),
        CONFIG,
        "has no attribute 'trunk'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ROWS.values(), ids=ROWS)
def test_bad_input_is_named(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_the_table_has_at_least_sixty_kinds() -> None:
    assert len(ROWS) >= 60


@pytest.mark.parametrize("answer", [True, np.True_, torch.tensor(True), torch.tensor([True])], ids=repr)
def test_what_can_be_taken_for_true_is(answer: Any) -> None:
    callback = teleporter(trigger=lambda gradients: answer)
    fit(Net(), make_batches(2), callbacks=[callback])
    assert len(callback.reports) == 2
    other = checks(answer)
    fit(Net(), make_batches(2), callbacks=[other])
    assert len(other.reports) == 2
