"""Multi-task methods with a state, random numbers or a nonlinear value: they train as they do in a plain loop."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.testing import assert_close
from torchjd import Stateful
from torchjd.aggregation import (
    CRMOGMWeighting,
    GradVac,
    GramianWeightedAggregator,
    MoDoWeighting,
    SDMGradWeighting,
)
from torchjd.scalarization import COSMOS, DWA, FAMO, IMTLL, STCH, UW, GeometricMean, Random, Scalarizer

from lightning_cost import ScaleInvariant
from lightning_cost._training.method_state import _move_constants, state_of
from tests.support.nets import Net, Seeds, fit, make_batches
from tests.support.resumed_run import REMEMBERING
from tests.support.teleporting import NoisyNet, assert_same, teleporter

EPOCHS = 3
BATCHES = 5

SCALARIZERS: dict[str, Callable[[], Scalarizer]] = {
    "SI": ScaleInvariant,
    "RLW": Random,
    "DWA": DWA,
    "UW": partial(UW, 3),
    "IMTL-L": partial(IMTLL, 3),
    "FAMO": partial(FAMO, 3, lr=0.3),
    "geometric mean": GeometricMean,
    "STCH": partial(STCH, 0.5),
}


def plain_loop(method: Scalarizer, net: NoisyNet, batches: list[Any], accumulated: int) -> None:
    """The examples in TorchJD's documentation, with random numbers and running statistics looked after by hand."""
    parameters = [*net.backbone.parameters(), *net.heads.parameters()]
    if not isinstance(method, FAMO):
        parameters += method.parameters()
    optimizer = torch.optim.Adam(parameters, lr=2e-2)

    def losses(index: int) -> Tensor:
        torch.manual_seed(index)
        return torch.stack(list(net.losses(batches[index]).values()))

    for _ in range(EPOCHS):
        for window in torch.arange(len(batches)).split(accumulated):
            before = []
            optimizer.zero_grad()
            for index in window.tolist():
                values = losses(index)
                before.append(values.detach())
                (method(values) / accumulated).backward()
            optimizer.step()
            if isinstance(method, FAMO):
                buffers = [buffer.clone() for buffer in net.backbone.buffers()]
                after = [losses(index).detach() for index in window.tolist()]
                for buffer, value in zip(net.backbone.buffers(), buffers, strict=True):
                    buffer.copy_(value)
                method(torch.stack(before).mean(dim=0))
                method.update(torch.stack(after).mean(dim=0))
        if isinstance(method, DWA):
            method.step()


@pytest.mark.parametrize(
    ("name", "accumulated"), [*((name, 1) for name in SCALARIZERS), ("DWA", 2), ("FAMO", 2), ("RLW", 2), ("SI", 2)]
)
def test_training_is_that_of_a_plain_loop(name: str, accumulated: int) -> None:
    batches = make_batches(BATCHES)
    module, net, method = NoisyNet(SCALARIZERS[name]()), NoisyNet(), SCALARIZERS[name]()
    module.make_optimizer = partial(torch.optim.Adam, lr=2e-2)
    fit(module, batches, max_epochs=EPOCHS, accumulate_grad_batches=accumulated, callbacks=[Seeds()])
    net.train()
    plain_loop(method, net, batches, accumulated)
    net.mtl_method = method
    trained, expected = module.state_dict(), net.state_dict()
    assert_close(trained, expected, rtol=0, atol=1e-6)
    # Otherwise the method did nothing.
    fit(constant := NoisyNet(), batches, max_epochs=EPOCHS, accumulate_grad_batches=accumulated, callbacks=[Seeds()])
    assert (trained["backbone.0.0.weight"] - constant.backbone[0][0].weight).abs().max() > 1e-3
    for parameter in module.mtl_method.parameters():
        assert (parameter != 0).all()


def test_scale_invariant_weighs_by_the_inverse_of_a_loss() -> None:
    batch, scales = make_batches(1), (1.0, 1e3, 1e-3)
    steps = []
    for module in (Net(ScaleInvariant()), Net(ScaleInvariant(), scales=scales)):
        fit(module, batch)
        steps.append({name: value.detach() for name, value in module.named_parameters()})
    assert_close(*steps, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"all must be positive; got \[1\.0, -2\.0\]"):
        ScaleInvariant()(torch.tensor([1.0, -2.0]))


# --------------------------------------------------------------------------------------------------------- teleports


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


@pytest.mark.parametrize("name", REMEMBERING)
def test_teleports_leave_the_state_of_a_method_alone(name: str) -> None:
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


# ------------------------------------------------------------------------------------------------- epochs, fits, steps


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


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("method", "names"), [(UW, "mtl_method.log_var"), (IMTLL, "mtl_method.log_scale")])
def test_parameters_that_no_optimizer_has_are_named(method: Any, names: str) -> None:
    module = Net(method(3))
    module.make_optimizer = lambda parameters: torch.optim.SGD(module.backbone.parameters(), lr=0.1)
    with pytest.raises(
        MisconfigurationException, match=f"learns {names}, but no optimizer has it. Pass `self.parameters"
    ):
        fit(module, make_batches(1))


@pytest.mark.parametrize("weighting", [MoDoWeighting(), SDMGradWeighting(), CRMOGMWeighting(MoDoWeighting())])
def test_methods_that_need_two_batches_a_step_are_refused(weighting: Any) -> None:
    with pytest.raises(MisconfigurationException, match="two independent batches"):
        fit(Net(GramianWeightedAggregator(weighting)), make_batches(1))


def test_famo_refuses_losses_below_their_bounds() -> None:
    with pytest.raises(
        ValueError, match=r"its `min_losses`, which are \[5.0, 0.0, 0.0\] for the tasks \['left', 'right'"
    ):
        fit(Net(FAMO(3, min_losses=torch.tensor([5.0, 0, 0]))), make_batches(1))


def test_famo_without_the_hook_of_the_mixin_is_an_error() -> None:
    class Forgetful(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

    with pytest.raises(MisconfigurationException, match="so FAMO cannot learn its weights"):
        fit(Forgetful(FAMO(3)), make_batches(1))


def test_a_state_that_is_not_known_is_no_silent_loss() -> None:
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
