"""Losses are held as they were at the step, or an error says why they cannot be."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import UserDict
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.data import Data
from torchjd.aggregation import UPGrad
from torchjd.scalarization import FAMO

from lightning_cost import MultiTaskMixin
from lightning_cost._lightning.recording import Scene
from tests.support.impure import REPEATABLE, Impure
from tests.support.nets import TASKS, Batch, Net, fit, make_batches, values_of
from tests.support.teleporting import teleporter

pytestmark = pytest.mark.slow

HELD = 0.02


class Witness(L.Callback):
    """Evaluates the losses from outside, from what was there before the step's forward pass."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.drifts: list[float] = []
        self.before: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # The tensors as well: the batch may be changed in place.
        self.frozen = [parameter for parameter in pl_module.parameters() if not parameter.requires_grad]
        self.scene = Scene(pl_module, batch, batch_idx, clone=True, written=self.frozen)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if len(self.callback.reports) == len(self.drifts):
            return
        report = self.callback.reports[-1]
        assert report.step == trainer.global_step
        now = Scene(pl_module, None, 0, written=self.frozen)
        arrived = values_of(pl_module)
        found = []
        for parameters in (self.left, arrived):
            torch.nn.utils.vector_to_parameters(parameters, pl_module.parameters())
            batch = self.scene.restore()
            with torch.enable_grad():
                found.append(pl_module.task_losses(batch, self.scene.batch_idx))
        now.restore()
        torch.nn.utils.vector_to_parameters(arrived, pl_module.parameters())
        one, two = ({name: float(loss) for name, loss in losses.items() if loss is not None} for losses in found)
        assert one.keys() == two.keys()
        self.drifts.append(max(abs(two[name] - one[name]) / abs(one[name]) for name in one))
        if report.accepted:
            assert self.drifts[-1] == pytest.approx(report.drift, rel=0.05, abs=1e-4)

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.left = values_of(pl_module)


def run(ways: Any, count: int = 8, mtl_method: Any = None, **settings: Any) -> tuple[Impure, Any, Witness]:
    torch.manual_seed(0)
    callback = teleporter(**settings)
    witness, module = Witness(callback), Impure(ways, mtl_method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, make_batches(count), callbacks=[callback, witness])
    return module, callback, witness


@pytest.mark.parametrize("way", REPEATABLE)
def test_what_starts_from_where_the_step_started_is_held(way: str) -> None:
    _, callback, witness = run([way])
    accepted = [report for report in callback.reports if report.accepted]
    assert len(accepted) >= 4
    assert len(witness.drifts) == len(callback.reports)
    assert all(drift <= HELD for drift, report in zip(witness.drifts, callback.reports, strict=True) if report.accepted)


@pytest.mark.parametrize("way", [way for way in REPEATABLE if way not in ("missing", "left out")])
@pytest.mark.parametrize("method", [None, UPGrad()], ids=["LS", "UPGrad"])
def test_teleports_that_are_refused_leave_no_trace(way: str, method: Any) -> None:
    batches, found = make_batches(5), []
    for callbacks in ([], [teleporter(tolerance=1e-12)]):
        L.seed_everything(0, verbose=False)
        module = Impure([way], method)
        fit(module, [{name: value.clone() for name, value in batch.items()} for batch in batches], callbacks=callbacks)
        found.append((values_of(module), module.center, module.hidden, module.calls, module.queue, module.table))
    for one, two in zip(*found, strict=True):
        assert str(one) == str(two)


@pytest.mark.parametrize("way", REPEATABLE)
def test_famo_learns_from_the_losses_of_the_step(way: str) -> None:
    """Its weights are those of a loop that evaluates from the state of before the forward pass."""
    torch.manual_seed(0)
    seen: list[tuple[dict[str, float], dict[str, float]]] = []

    class Looking(FAMO):
        def update(self, values: Tensor, /) -> None:
            seen.append((dict(module.now), dict(zip(TASKS, values.tolist(), strict=True))))
            super().update(values)

    class Watched(Impure):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = super().task_losses(batch, batch_idx)
            if not self.replaying:
                self.now = {name: float(loss) for name, loss in losses.items() if loss is not None}
            return losses

    module = Watched([way], Looking(3))
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, make_batches(6))
    assert len(seen) >= 5
    for before, after in seen:
        for name, loss in before.items():
            assert after[name] == pytest.approx(loss, rel=1e-3)


class Outside(Net):
    """Its losses depend on an object that nobody can put back."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.count = itertools.count()

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        losses = super().task_losses(batch, batch_idx)
        return losses | {"right": losses["right"] * (1 + 0.3 * next(self.count))}


def test_losses_that_do_not_come_back_are_an_error() -> None:
    module, callback = Outside(), teleporter()
    with pytest.raises(
        RuntimeError,
        match=r"SymmetryTeleportCallback evaluates.*other losses: task 'right' from .* to .*unrepeatable='skip'",
    ):
        fit(module, make_batches(4), callbacks=[callback])
    assert [report.accepted for report in callback.reports] == [False]
    assert torch.equal(values_of(module), values_of(Outside()))


def test_losses_that_do_not_come_back_can_be_skipped() -> None:
    module, callback = Outside(), teleporter(unrepeatable="skip")
    with pytest.warns(UserWarning, match=r"task 'right' from .* to .*These teleports are skipped"):
        fit(module, make_batches(4), callbacks=[callback])
    assert [report.accepted for report in callback.reports] == [False] * 4
    assert all("the losses do not come back" in report.reason for report in callback.reports)


def test_losses_that_stop_to_come_back_are_noticed_later() -> None:
    class Later(Outside):
        def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
            return super().task_losses(batch, batch_idx) if batch_idx > 3 else self.losses(batch)

    callback = teleporter(tolerance=None, unrepeatable="skip")
    with pytest.warns(UserWarning, match="These teleports are skipped"):
        fit(Later(), make_batches(22), callbacks=[callback])
    assert "do not come back" in callback.reports[-1].reason


def test_a_method_that_compares_losses_refuses_those_that_do_not_come_back() -> None:
    with pytest.raises(RuntimeError, match=r"FAMO evaluates `task_losses` again.*task 'right' from"):
        fit(Outside(FAMO(3)), make_batches(4))


def test_the_check_is_a_forward_pass_in_the_first_teleport_and_seldom_after() -> None:
    callback = teleporter(trigger=lambda gradients: True, tolerance=1e-12)
    fit(Net(), make_batches(34), callbacks=[callback])
    extra = [report.forwards - callback.reports[1].forwards for report in callback.reports]
    assert [index for index, count in enumerate(extra) if count] == [0, 16, 32]
    assert max(extra) == 1


@dataclasses.dataclass
class Items:
    x: Tensor
    targets: dict[str, Tensor]


def batches_of(kind: str) -> list[Any]:
    made: dict[str, Any] = {
        "UserDict": UserDict,
        "dataclass": lambda batch: Items(batch["x"], {task: batch[task] for task in TASKS}),
        "graph": lambda batch: Data(**batch),
        "list": lambda batch: [batch["x"], {task: batch[task] for task in TASKS}],
    }
    return [made[kind](batch) for batch in make_batches(6)]


@pytest.mark.parametrize("kind", ["UserDict", "dataclass", "graph", "list"])
def test_a_batch_of_any_class_may_be_taken_apart(kind: str) -> None:
    class TakesApart(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            if isinstance(batch, UserDict):
                return self.losses({"x": batch.pop("x")} | {task: batch.pop(task) for task in TASKS})
            if isinstance(batch, list):
                targets = batch.pop()
                return self.losses({"x": batch.pop() * 2} | {task: targets.pop(task) for task in TASKS})
            batch.x = batch.x * 2
            if isinstance(batch, Items):
                return self.losses({"x": batch.x} | {task: batch.targets.pop(task) for task in TASKS})
            return self.losses({"x": batch.x} | {task: batch[task] for task in TASKS})

    callback = teleporter()
    fit(TakesApart(), batches_of(kind), callbacks=[callback])
    assert sum(report.accepted for report in callback.reports) >= 4
    fit(TakesApart(FAMO(3)), batches_of(kind))


def test_a_batch_that_is_changed_in_place_is_copied_from_the_second_on() -> None:
    _, callback, _ = run(["batch_in_place"])
    assert "has changed its batch or a frozen parameter (batch['x'])" in callback.reports[0].reason
    assert sum(report.accepted for report in callback.reports[1:]) >= 4


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    ways=st.lists(st.sampled_from([*REPEATABLE, "outside"]), min_size=1, max_size=4, unique=True),
    method=st.sampled_from([None, UPGrad]),
    accumulated=st.sampled_from([1, 1, 2]),
)
def test_losses_are_held_or_it_is_said(ways: list[str], method: Any, accumulated: int) -> None:
    class Mixed(Impure):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.count = itertools.count()

        def outside(self, features: Tensor) -> Tensor:
            return torch.tensor(1 + 0.3 * (next(self.count) % 5))

    torch.manual_seed(0)
    callback = teleporter()
    module = Mixed(ways, None if method is None else method())
    witness = Witness(callback)
    callbacks = [callback, witness] if accumulated == 1 and "outside" not in ways else [callback]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "outside" in ways:
            with pytest.raises(RuntimeError, match="must be repeatable"):
                fit(module, make_batches(6), callbacks=callbacks, accumulate_grad_batches=accumulated)
            assert not any(report.accepted for report in callback.reports)
            return
        fit(module, make_batches(6), callbacks=callbacks, accumulate_grad_batches=accumulated)
    pairs = zip(witness.drifts, callback.reports, strict=accumulated == 1)
    assert all(drift <= HELD for drift, report in pairs if report.accepted)


def test_further_evaluations_log_nothing() -> None:
    class Logs(Net):
        def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
            losses = super().task_losses(batch, batch_idx)
            self.log("calls", 1.0, on_step=False, on_epoch=True, reduce_fx="sum", batch_size=1)
            self.log_dict({"more": 1.0}, on_step=False, on_epoch=True, reduce_fx="sum", batch_size=1)
            return losses

    trainer = fit(Logs(), make_batches(4), callbacks=[teleporter()])
    assert trainer.callback_metrics["calls"] == trainer.callback_metrics["more"] == 4


class Dropped(MultiTaskMixin, L.LightningModule):
    """Evaluated in evaluation mode, BatchNorm uses the buffers that the same forward pass has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS})

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        features = self.backbone(batch["x"])
        self.norm.train()
        self.norm(features)
        self.norm.eval()
        features = self.norm(features).tanh()
        return {task: (head(features) - batch[task]).square().mean() for task, head in self.heads.items()}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_running_statistics_are_those_of_before_the_forward_pass() -> None:
    callback = teleporter()
    fit(Dropped(), make_batches(6), callbacks=[callback])
    assert sum(report.accepted for report in callback.reports) >= 4
