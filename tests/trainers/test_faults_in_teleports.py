"""If a teleport fails, wherever that is, everything is as it was before it."""

from __future__ import annotations

import copy
import math
import random
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torchjd.aggregation import UPGrad

import lightning_cost
from lightning_cost import (
    ConflictAlignment,
    LevelSetSearch,
    PenaltySearch,
    RandomDirection,
    SampledSharpness,
    SymmetryTeleportCallback,
    TaskGradients,
)
from lightning_cost.searches._adapters import PeftAdapter
from lightning_cost.surface import Surface
from tests.support.nets import Net, fit, make_batches
from tests.support.teleporting import NoisyNet, always, assert_same, final_state, snapshot, teleporter
from tests.support.versions import needs_save_on_exception

pytestmark = pytest.mark.slow

STRUCK_STEP = 3

Place = tuple[str, str, str]


def everything(trainer: L.Trainer, module: Any) -> dict[str, Any]:
    """What a teleport that ended in a fault must leave to the bit."""
    gradients = module.task_gradients
    return {
        **snapshot(module),
        "grad identities": [id(parameter.grad) for parameter in module.parameters()],
        "plain attributes": {
            f"{path}.{name}": value
            for path, owner in module.named_modules()
            for name, value in vars(owner).items()
            if isinstance(value, (bool, int, float, str, type(None)))
        },
        "task gradients": None if gradients is None else gradients.matrix.clone(),
        "optimizer": copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "grad mode": torch.is_grad_enabled(),
        # As bytes: thousands of numbers take most of the time to compare.
        "random": [torch.get_rng_state(), repr(random.getstate()), np.random.get_state()[1].tobytes()],  # noqa: NPY002
    }


class Fault:
    """Raises an error at a place that a teleport passes: where a function is entered, or where it returns.

    Functions are those of the package, and those that it calls to evaluate and differentiate. Without a place it only
    takes down which there are, from the start of the search until the teleport is final.
    """

    package = str(Path(lightning_cost.__file__).parent)
    others = (
        NoisyNet.task_losses,
        torch.autograd.grad,
        torch.Tensor.backward,
        torch.optim.Adam.step,
        PeftAdapter.__init__,
    )
    # Python swallows what is raised where it finalizes a generator; the rest only looks at something.
    ignored = frozenset(
        {
            "<genexpr>",
            "<listcomp>",
            "candidates",
            "views",
            "columns",
            "num_elements",
            "row_dtype",
            "gradients",
        }
    )
    codes: frozenset[CodeType] = frozenset(function.__code__ for function in others)

    def __init__(self, at: Place | None = None, error: BaseException | None = None) -> None:
        self.at = at
        self.error = error
        self.places: dict[Place, None] = {}
        self.searching = False

    def __enter__(self) -> Fault:
        self._previous = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *args: object) -> None:
        sys.settrace(self._previous)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not (frame.f_code.co_filename.startswith(self.package) or frame.f_code in self.codes):
            return None
        frame.f_trace_lines = False
        self._pass("enter", frame)
        return self._leave

    def _leave(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "return":
            self._pass("leave", frame)
        return self._leave

    def _pass(self, what: str, frame: FrameType) -> None:
        name = frame.f_code.co_name
        self.searching = (self.searching or name == "run") and name != "arm"
        if not self.searching or name in self.ignored:
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(self.package):
            caller = caller.f_back
        place = what, name, caller.f_code.co_name if caller is not None else ""
        self.places.setdefault(place)
        # Python stops following calls once this has raised.
        if self.error is not None and place == self.at:
            raise self.error


def protected(place: Place) -> bool:
    """What undoes things on the way out cannot undo a fault of its own."""
    undoing = {"preserved_rng", "preserved", "without_trace", "restore"}
    return undoing.isdisjoint(place) and place != ("leave", "run", "teleport")


class Battered(SymmetryTeleportCallback):
    """Tries the teleport of one step again and again, each time with a fault at another place, and at last without."""

    faults: list[Fault]
    passed: dict[Place, None]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step != STRUCK_STEP:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            return
        generator = self._generator.get_state()
        before = everything(trainer, pl_module)
        for fault in self.faults:
            assert fault.error is not None
            count = len(self.reports)
            with pytest.raises(type(fault.error)) as caught, fault:
                super().on_before_optimizer_step(trainer, pl_module, optimizer)
            # An error of the multi-task method gets the name of the method.
            assert fault.error in (caught.value, caught.value.__cause__)
            assert_same(everything(trainer, pl_module), before, f"{fault.at}: ")
            (report,) = self.reports[count:]
            assert not report.accepted
            assert report.reason == f"{type(caught.value).__name__}: {caught.value}"
            assert report.losses_after == report.losses_before
            self._generator.set_state(generator)
        with Fault() as watch:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.passed = watch.places


def battered(settings: dict[str, Any], accumulated: int, faults: list[Fault]) -> tuple[Battered, dict[str, Any]]:
    callback = Battered(trigger=always, start_epoch=0, **settings)
    callback.faults = faults
    torch.manual_seed(0)
    module = NoisyNet(UPGrad())
    module.make_optimizer = partial(torch.optim.Adam, lr=1e-2)
    batches = make_batches(5 * accumulated)
    trainer = fit(module, batches, callbacks=[callback], accumulate_grad_batches=accumulated)
    return callback, final_state(module, trainer)


BATTERED: dict[str, tuple[dict[str, Any], int]] = {
    "level set, 2 micro-batches": ({}, 2),
    "level set, double backward": ({"objective": ConflictAlignment(derivative="double_backward")}, 1),
    "penalty, sharpness, 2 micro-batches": (
        {"search": PenaltySearch(steps=1, lr=1e-2), "objective": SampledSharpness(samples=1)},
        2,
    ),
}


@pytest.mark.parametrize(("settings", "accumulated"), BATTERED.values(), ids=BATTERED)
def test_a_fault_in_any_part_leaves_everything_as_it_was(settings: dict[str, Any], accumulated: int) -> None:
    undisturbed, expected = battered(settings, accumulated, [])
    assert undisturbed.reports[STRUCK_STEP].accepted
    faults = [Fault(place, RuntimeError("fault")) for place in undisturbed.passed if protected(place)]
    assert len(faults) > 100
    _, state = battered(settings, accumulated, faults)
    assert_same(state, expected)


class FragileNet(NoisyNet):
    """Fails, or has losses that are not finite, at the n-th evaluation of the losses within a teleport."""

    def __init__(self, fault: BaseException | float, evaluation: int) -> None:
        super().__init__(UPGrad())
        self.make_optimizer = partial(torch.optim.Adam, lr=1e-2)
        # An object of its own: attributes are restored before each evaluation.
        self.count = SimpleNamespace(down=evaluation, fault=fault)

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = super().task_losses(batch, batch_idx)
        if self.replaying and self.trainer.global_step >= STRUCK_STEP:
            self.count.down -= 1
            if self.count.down == 0:
                if isinstance(self.count.fault, float):
                    return {**losses, "right": losses["right"] * self.count.fault}
                raise self.count.fault
        return losses


class Observer(L.Callback):
    """Keeps what was there at the last optimizer step, and how it began."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.states[trainer.global_step] = everything(trainer, pl_module)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores further interrupts after the first."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


FAULTS = {
    "error": (RuntimeError("fault"), RuntimeError),
    "out of memory": (torch.OutOfMemoryError("fault"), torch.OutOfMemoryError),
    "interrupt": (KeyboardInterrupt("fault"), (KeyboardInterrupt, SystemExit)),
}


@pytest.mark.parametrize(("battery", "evaluation"), zip(BATTERED.values(), (4, 1, 7), strict=True), ids=BATTERED)
@pytest.mark.parametrize(("fault", "raised"), FAULTS.values(), ids=FAULTS)
@pytest.mark.usefixtures("interruptible")
def test_training_goes_on_after_a_fault(
    fault: BaseException, raised: Any, battery: tuple[dict[str, Any], int], evaluation: int
) -> None:
    settings, accumulated = battery
    module, observer, callback = FragileNet(fault, evaluation), Observer(), teleporter(**settings)
    with pytest.raises(raised):
        fit(module, make_batches(20), callbacks=[observer, callback], accumulate_grad_batches=accumulated)
    step, before = max(observer.states.items())
    after = {**snapshot(module), "random": before["random"]}
    # Lightning has freed the optimizer by now.
    assert_same(after, {key: before[key] for key in after})
    assert callback.reports[-1].step == step
    assert not callback.reports[-1].accepted
    assert callback.reports[-1].reason == f"{type(fault).__name__}: fault"
    count = len(callback.reports)
    trainer = fit(module, make_batches(5, seed=1), callbacks=[callback])
    assert trainer.global_step == 5
    assert len(callback.reports) == count + 5
    assert any(report.accepted for report in callback.reports[count:])


@pytest.mark.parametrize(
    ("settings", "accumulated", "evaluations"),
    [
        ({}, 1, 4),
        ({}, 2, 8),
        ({"objective": RandomDirection(), "search": LevelSetSearch(backtracks=0)}, 2, 6),
        (*BATTERED["level set, double backward"], 3),
        (*BATTERED["penalty, sharpness, 2 micro-batches"], 11),
    ],
)
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_refused(
    settings: dict[str, Any], accumulated: int, evaluations: int, fault: float
) -> None:
    """One after the other, each evaluation of a teleport returns such a loss."""
    refused = 0
    steps = STRUCK_STEP + 2
    batches = make_batches(steps * accumulated)
    for evaluation in range(1, evaluations + 1, 1 + (evaluations > 5)):
        module, callback = FragileNet(fault, evaluation), teleporter(**settings)
        before, after = Observer(), Observer()
        trainer = fit(module, batches, callbacks=[before, callback, after], accumulate_grad_batches=accumulated)
        assert trainer.global_step == steps
        assert module.count.down <= 0
        for report in callback.reports:
            finite = all(map(math.isfinite, report.losses_after.values()))
            assert finite or report.reason == "a loss or gradient is not finite where the teleport starts"
            one, two = before.states[report.step], after.states[report.step]
            if report.accepted:
                assert report.drift <= 0.02
                assert all(bool(torch.isfinite(grad).all()) for grad in two["grads"].values())
                assert bool(torch.isfinite(two["task gradients"]).all())
            else:
                assert_same(two, one)
                refused += 1
        assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())
    assert refused


def test_a_fault_in_the_trigger_leaves_everything_as_it_was() -> None:
    """No teleport was tried, so that none is reported."""

    def broken(gradients: TaskGradients) -> bool:
        gradients.cosines.sum()
        raise RuntimeError("fault")

    module, observer, callback = NoisyNet(UPGrad()), Observer(), teleporter(trigger=broken)
    with pytest.raises(RuntimeError, match="fault"):
        fit(module, make_batches(4), callbacks=[observer, callback])
    assert_same(snapshot(module)["parameters"], observer.states[0]["parameters"])
    assert_same(snapshot(module)["buffers"], observer.states[0]["buffers"])
    assert callback.reports == []
    callback.trigger = always
    fit(module, make_batches(4), callbacks=[callback])
    assert [report.step for report in callback.reports] == [0, 1, 2, 3]


class Broken(ConflictAlignment):
    """Fails once, in a part of it, after the surface has moved."""

    def __init__(self, part: str, call: int) -> None:
        super().__init__()
        self.part, self.countdown = part, call

    def strike(self, part: str, surface: Surface) -> None:
        self.countdown -= part == self.part
        if self.countdown == 0 and part == self.part:
            surface.move_by(surface.standard_normal())
            raise RuntimeError("fault")

    def begin(self, surface: Surface, start: Any) -> None:
        self.strike("begin", surface)

    def value(self, surface: Surface, point: Any) -> float:
        self.strike("value", surface)
        return super().value(surface, point)

    def value_and_gradient(self, surface: Surface, point: Any) -> tuple[float, Tensor]:
        self.strike("value_and_gradient", surface)
        return super().value_and_gradient(surface, point)


@needs_save_on_exception
@pytest.mark.parametrize("search", [LevelSetSearch(), PenaltySearch(steps=2, lr=1e-2)], ids=["level set", "penalty"])
@pytest.mark.parametrize(("part", "call"), [("begin", 1), ("value", 1), ("value", 2), ("value_and_gradient", 1)])
def test_a_fault_in_an_objective_is_saved_as_it_was_before(part: str, call: int, search: Any, tmp_path: Any) -> None:
    """The checkpoint that an exception leaves is from before the teleport, and training goes on from it."""
    batches, callback, observer = (
        make_batches(6),
        teleporter(objective=Broken(part, call + 2), search=search),
        Observer(),
    )
    saver = ModelCheckpoint(tmp_path, save_on_exception=True)
    module = Net(UPGrad())
    with pytest.raises(RuntimeError, match="fault"):
        fit(module, batches, callbacks=[observer, callback, saver], enable_checkpointing=True)
    (path,) = tmp_path.iterdir()
    step, before = max(observer.states.items())
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == step > 0
    assert_same(dict(saved["state_dict"]), {**before["parameters"], **before["buffers"]})
    assert_same(saved["optimizer_states"], before["optimizer"])
    restored = teleporter(objective=Broken("", 0), search=search)
    trainer = fit(Net(UPGrad()), batches, ckpt_path=path, callbacks=[restored])
    assert trainer.global_step == 6
    assert [report.reason for report in restored.reports if not report.accepted][:1] == ["RuntimeError: fault"]
    assert any(report.accepted for report in restored.reports[step + 1 :])
