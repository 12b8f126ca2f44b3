"""What a method remembers: teleports, validation and skipped steps leave it alone, and fits go on with it."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torchjd import Stateful
from torchjd.aggregation import GradVac
from torchjd.scalarization import COSMOS, DWA, FAMO, STCH, Scalarizer

from lightning_cost._training.method_state import _move_constants, state_of
from tests.support.nets import Net, fit, make_batches
from tests.support.resumed_run import REMEMBERING
from tests.support.teleporting import assert_same, never, teleporter

BATCHES = 5


class BeforeAndAfter(L.Callback):
    """Compares all that a method remembers, attributes included, before and after a callback."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        method = pl_module.mtl_method
        attributes = [
            {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in vars(part).items()
                if isinstance(value, (Tensor, int, float))
            }
            for part in method.modules()
        ]
        parameters = {name: value.detach().clone() for name, value in method.named_parameters()}
        self.states.append([copy.deepcopy(state_of(method)), attributes, parameters])


SCALARIZERS = [name for name, make in REMEMBERING.items() if isinstance(make(), Scalarizer)]


@pytest.mark.parametrize("name", SCALARIZERS)
def test_teleports_leave_the_state_of_a_scalarizer_alone(name: str) -> None:
    before, after, callback = BeforeAndAfter(), BeforeAndAfter(), teleporter()
    module = Net(REMEMBERING[name]())
    module.make_optimizer = partial(torch.optim.Adam, lr=1e-2)
    fit(module, make_batches(5), callbacks=[before, callback, after], max_epochs=3)
    assert sum(report.accepted for report in callback.reports) >= 5
    assert_same(after.states, before.states)
    assert len(before.states) == 15
    if name != "RLW":
        with pytest.raises(AssertionError):
            assert_same(before.states[-1], before.states[0])


class Replica(L.Callback):
    """Applies a copy of the method once in each step, to the task gradients that the step goes on with."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.method(pl_module.task_gradients.matrix)


@pytest.mark.parametrize("name", ["PCD", "Nash-MTL", "ExcessMTL"])
def test_a_step_with_a_teleport_is_one_step_of_an_aggregator(name: str) -> None:
    replica, callback = Replica(REMEMBERING[name]()), teleporter()
    module = Net(REMEMBERING[name]())
    module.make_optimizer = partial(torch.optim.Adam, lr=1e-2)
    fit(module, make_batches(5), callbacks=[callback, replica], max_epochs=3)
    assert sum(report.accepted for report in callback.reports) >= 5
    for one, other in zip(_flat(state_of(module.mtl_method)), _flat(state_of(replica.method)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def _flat(state: Any) -> list[Tensor]:
    if isinstance(state, dict):
        return [leaf for value in state.values() for leaf in _flat(value)]
    return [torch.as_tensor(state)] if isinstance(state, (Tensor, int, float)) else []


class Nested(Scalarizer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = DWA()
        self.register_buffer("calls", None)

    def forward(self, values: Tensor, /) -> Tensor:
        self.calls = torch.tensor(0) if self.calls is None else self.calls + 1
        return self.inner(values)


def test_evaluations_apart_from_training_steps_leave_parts_of_a_method_alone() -> None:
    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(make_batches(3), batch_size=None)

    module = Validated(Nested())
    fit(module, make_batches(4), callbacks=[teleporter()], num_sanity_val_steps=1)
    assert int(module.mtl_method.calls) + 1 == module.mtl_method.inner._n_batches == 4


def test_scalarizers_that_remember_losses_see_each_step_once() -> None:
    module = Net(DWA())
    callback = teleporter()
    fit(module, make_batches(4), callbacks=[callback])
    assert any(report.accepted for report in callback.reports)
    assert module.mtl_method._n_batches == 4


class Diary(Scalarizer):
    """Remembers its calls in a list, a dictionary, a set and a tensor, and writes into them."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []
        self.last: dict[str, float] = {}
        self.seen: set[float] = set()
        self.total = torch.zeros(3)

    def forward(self, values: Tensor, /) -> Tensor:
        self.values.append(float(values.detach().sum()))
        self.last["call"] = self.values[-1]
        self.seen.add(self.values[-1])
        self.total += values.detach()
        return values.mean()


def test_a_teleport_leaves_no_trace_in_a_method_that_writes_into_its_attributes() -> None:
    diaries = []
    for callbacks in ([], [teleporter(trigger=never)], [teleporter()]):
        diaries.append(Diary())
        fit(Net(diaries[-1]), make_batches(4), callbacks=callbacks)
    without, untouched, teleported = diaries
    assert untouched.values == without.values
    assert len(teleported.values) == len(teleported.seen) == 4
    assert teleported.values[0] == without.values[0]
    assert teleported.last == {"call": teleported.values[-1]}
    assert float(teleported.total.sum()) == pytest.approx(sum(teleported.values), rel=1e-5)


class Losses(L.Callback):
    """What FAMO compares: the losses before and after each step."""

    def __init__(self, method: FAMO) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        update = method.update

        def recorded(values: Tensor) -> None:
            self.before.append(method._prev_losses)
            self.after.append(values)
            update(values)

        method.update = recorded


@pytest.mark.parametrize("accumulated", [1, 2])
def test_famo_compares_with_the_point_that_a_teleport_led_to(accumulated: int) -> None:
    method, batches = FAMO(3), make_batches(6)
    seen, callback, module = Losses(method), teleporter(), Net(method)
    points: list[Tensor] = []

    class Point(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            ready = trainer.fit_loop.batch_idx + 1
            window = batches[ready - accumulated : ready]
            with torch.no_grad():
                points.append(torch.stack([torch.stack(list(module.losses(x).values())) for x in window]).mean(dim=0))

    fit(module, batches, callbacks=[callback, Point()], accumulate_grad_batches=accumulated)
    assert sum(report.accepted for report in callback.reports) >= 3
    assert len(seen.before) == len(points) == 6 // accumulated
    for before, point in zip(seen.before, points, strict=True):
        assert torch.equal(before, point)


def test_dwa_goes_on_over_fits() -> None:
    batches = make_batches(BATCHES)
    whole, parts = Net(DWA()), Net(DWA())
    fit(whole, batches, max_epochs=4)
    for _ in range(2):
        fit(parts, batches, max_epochs=2)
    assert_same(dict(parts.state_dict()), dict(whole.state_dict()))
    assert_same(parts.mtl_method._previous_averages, whole.mtl_method._previous_averages)


def test_famo_survives_fits_that_fail() -> None:
    """Whatever ended the fit before, each step brings one update."""
    method = FAMO(3)
    module, seen = Net(method), Losses(method)
    optimizer = torch.optim.SGD([*module.backbone.parameters(), *module.heads.parameters()], lr=0.05)
    module.make_optimizer = lambda parameters: optimizer

    class Failing(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("fault")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="fault"):
            fit(module, make_batches(4), callbacks=[Failing()])
    seen.before.clear()
    fit(module, make_batches(4))
    assert len(seen.before) == 4
    assert not optimizer._optimizer_step_post_hooks
    optimizer.step()
    assert len(seen.before) == 4


def test_a_step_that_a_gradient_scaler_skips_brings_no_update() -> None:
    method = FAMO(3)
    module, seen, steps = Net(method), Losses(method), []

    class Steps(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.optimizers[0].register_step_post_hook(lambda *args: steps.append(None))

    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**22))]
    callbacks = [Steps(), teleporter()]
    fit(module, make_batches(6), max_epochs=2, plugins=plugins, callbacks=callbacks)
    assert 0 < len(steps) < 12
    assert len(seen.before) == len(steps)
    assert torch.isfinite(method._w).all()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_losses_that_a_gradient_scaler_skips_are_not_remembered(bad: float) -> None:
    class Overflowing(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            losses = super().task_losses(batch, batch_idx)
            return losses | {"left": losses["left"] * bad} if batch_idx == 1 else losses

    module = Overflowing(DWA())
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]
    fit(module, make_batches(3), max_epochs=4, plugins=plugins)
    assert module.mtl_method._n_batches == 2
    assert torch.isfinite(torch.stack(module.mtl_method._previous_averages)).all()


def test_a_method_whose_state_is_not_known_warns() -> None:
    class Unknown(Scalarizer, Stateful):
        count = 0

        def forward(self, values: Tensor, /) -> Tensor:
            self.count += 1
            return values.sum()

        def reset(self) -> None:
            self.count = 0

    class Extended(DWA):
        pass

    class Saved(Unknown):
        def get_extra_state(self) -> Any:
            return {"count": self.count}

        def set_extra_state(self, state: Any) -> None:
            self.count = state["count"]

    for method in (Unknown(), Extended()):
        with pytest.warns(UserWarning, match=f"does not know what {type(method).__name__} remembers from step to step"):
            fit(Net(method), make_batches(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="What Saved remembers")
        fit(Net(Saved()), make_batches(1))


def test_constants_of_a_method_follow_the_module() -> None:
    """A user cannot know the device in ``__init__``."""
    method = nn.ModuleList([STCH(0.5, weights=torch.ones(3)), COSMOS(1.0, torch.ones(3))])
    _move_constants(method, torch.device("meta"))
    assert all(part.weights.is_meta for part in method)


def test_buffers_of_a_method_are_in_no_state_dict() -> None:
    """They do not exist before the first step: a new module could not load them."""
    module = Net(GradVac())
    fit(module, make_batches(2))
    assert module.mtl_method.gramian_weighting._phi_t is not None
    Net(GradVac()).load_state_dict(module.state_dict())
    assert set(module.state_dict()) == set(Net().state_dict())
