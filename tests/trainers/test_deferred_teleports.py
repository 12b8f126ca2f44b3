"""The deferred mode: a teleport is accepted by its losses, and the update takes the gradients at hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torchjd.aggregation import UPGrad
from torchjd.scalarization import FAMO, UW

from lightning_cost import ConflictAlignment, LevelSetSearch, RandomDirection, SymmetryTeleportCallback
from lightning_cost._training.method import FamoMethod
from tests.support.nets import TASKS, Net, fit, grads_of, make_batches, make_trainer
from tests.support.teleporting import NoisyNet, SaveAt, Spy, StatefulBatches, assert_same, teleporter, without_time

pytestmark = pytest.mark.slow

METHODS = {"LS": lambda: None, "UPGrad": UPGrad, "UW": partial(UW, 3), "FAMO": partial(FAMO, 3)}


def deferred(**settings: Any) -> SymmetryTeleportCallback:
    return teleporter(reevaluate=False, **settings)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("make", [Net, NoisyNet])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_shared_parameters_move_and_the_update_takes_the_gradients_at_hand(
    make: Any, method: Any, accumulate: int
) -> None:
    before, after, callback = Spy(), Spy(), deferred()
    batches = make_batches(8)
    fit(make(method()), batches, callbacks=[before, callback, after], accumulate_grad_batches=accumulate)
    assert any(report.accepted for report in callback.reports)
    for report, one, two in zip(callback.reports, before.snapshots, after.snapshots, strict=True):
        same = set(one) - ({"parameters"} if report.accepted else set())
        assert_same({key: two[key] for key in same}, {key: one[key] for key in same})
        moved = {
            name for name in one["parameters"] if not torch.equal(one["parameters"][name], two["parameters"][name])
        }
        assert bool(moved) == report.accepted
        assert all(name.startswith("backbone.") for name in moved)
        assert report.drift <= 0.02


def test_drift_is_that_of_an_independent_measurement() -> None:
    after, callback, batches = Spy(), deferred(), make_batches(6)
    module = Net()
    fit(module, batches, callbacks=[callback, after])
    for report, snapshot, batch in zip(callback.reports, after.snapshots, batches, strict=True):
        module.load_state_dict(snapshot["parameters"])
        losses = {task: loss.item() for task, loss in module.losses(batch).items()}
        assert losses == pytest.approx(report.losses_after, rel=1e-5)
        changes = [abs(losses[task] / report.losses_before[task] - 1) for task in TASKS]
        assert report.drift == pytest.approx(max(changes), abs=1e-5)


def test_a_teleport_takes_one_derivative_and_two_forward_passes() -> None:
    callback = deferred()
    fit(Net(), make_batches(6), callbacks=[callback])
    # The first one looks as well whether the losses come back.
    costs = {(report.forwards, report.backwards) for report in callback.reports[1:] if report.accepted}
    assert (3, 1) in costs
    # A step that was shortened once.
    assert costs <= {(3, 1), (5, 1)}


def test_a_step_is_shortened_once_and_then_undone() -> None:
    before, after, callback = Spy(), Spy(), deferred(tolerance=1e-9)
    fit(Net(), make_batches(4), callbacks=[before, callback, after])
    for report, one, two in zip(callback.reports, before.snapshots, after.snapshots, strict=True):
        assert not report.accepted
        assert "over the tolerance" in report.reason
        assert sum(stage["stage"] == "step" for stage in report.trace) == 2
        assert_same(two, one)


def test_the_next_check_fills_in_the_conflict() -> None:
    class Check(L.Callback):
        """Comes before the teleport callback."""

        def __init__(self) -> None:
            self.found: dict[int, tuple[dict[str, float], float]] = {}

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            gradients = pl_module.task_gradients
            cosines = dict(zip(gradients.names, gradients.cosines.tolist(), strict=True))
            self.found[trainer.global_step] = cosines, gradients.mean_norm.item()

    check, callback = Check(), deferred()
    module = Net(UPGrad())
    fit(module, make_batches(6), callbacks=[check, callback])
    *checked, last = [report for report in callback.reports if report.accepted]
    assert checked
    for report in checked:
        assert not report.reevaluated
        assert report.checked_at == report.step + 1
        assert (report.cosines_after, report.grad_norm_after) == check.found[report.step + 1]
    assert (last.cosines_after, last.grad_norm_after, last.checked_at) == ({}, None, None)


def test_logged_conflict_after_is_the_mean_of_what_was_checked() -> None:
    class Logged(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.metrics = dict(trainer.callback_metrics)

    logged, callback = Logged(), deferred()
    fit(Net(), make_batches(6), callbacks=[callback, logged])
    after = [min(report.cosines_after.values()) for report in callback.reports if report.cosines_after]
    assert logged.metrics["cost/cosine_after"].item() == pytest.approx(sum(after) / len(after), abs=1e-6)


def test_a_resumed_run_continues_to_the_bit_between_a_teleport_and_its_check(tmp_path: Any) -> None:
    batches = make_batches(6)

    def train(callbacks: list[L.Callback], ckpt_path: Any = None) -> Any:
        module, callback = Net(UPGrad()), deferred()
        trainer = make_trainer(callbacks=[callback, *callbacks])
        trainer.fit(module, StatefulBatches(batches), ckpt_path=ckpt_path)
        return dict(module.state_dict()), callback.reports

    path = tmp_path / "half.ckpt"
    whole, reports = train([SaveAt(path, 3)])
    resumed, again = train([], path)
    assert_same(resumed, whole)
    assert without_time(again, 3) == without_time(reports, 3)


def test_famo_compares_losses_from_where_the_teleport_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[float], list[float]]] = []
    update = FamoMethod.update

    def spied(self: Any, before: Any, after: Any, *args: Any) -> None:
        seen.append((before.tolist(), after.tolist()))
        update(self, before, after, *args)

    monkeypatch.setattr(FamoMethod, "update", spied)
    callback = deferred()
    fit(Net(FAMO(3)), make_batches(5), callbacks=[callback])
    accepted = [report for report in callback.reports if report.accepted]
    assert accepted
    for report in accepted:
        assert seen[report.step][0] == pytest.approx(list(report.losses_after.values()), rel=1e-6)


def test_an_edit_of_the_gradients_before_the_teleport_holds() -> None:
    class Edit(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            for parameter in pl_module.parameters():
                parameter.grad.mul_(0.5)
            self.grads = grads_of(pl_module)

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            assert_same(grads_of(pl_module), edit.grads)

    edit, callback = Edit(), deferred()
    fit(Net(), make_batches(4), callbacks=[edit, callback, Look()])
    assert any(report.accepted for report in callback.reports)


@pytest.mark.parametrize("tasks", [2, 3])
def test_conflict_lessens_at_the_same_batch_and_not_in_a_random_direction(tasks: int) -> None:
    gains = {}
    for name, objective in (("conflict", ConflictAlignment(terms="mean")), ("random", RandomDirection())):
        gains[name] = 0.0
        for seed in range(12):
            callback = deferred(trigger="any", objective=objective)
            module = Net(tasks=TASKS[:tasks], scales=[1.0, 0.1, 0.1][:tasks])
            module.make_optimizer = partial(torch.optim.SGD, lr=1e-9)
            fit(module, make_batches(1, TASKS[:tasks], seed=seed) * 2, callbacks=[callback])
            for report in callback.reports:
                if report.cosines_after:
                    gains[name] += min(report.cosines_after.values()) - min(report.cosines_before.values())
    assert gains["conflict"] > 0
    assert gains["conflict"] > 2 * gains["random"]


def test_reevaluate_is_refused_with_a_search_of_several_steps() -> None:
    with pytest.raises(ValueError, match=r"`reevaluate=False` takes one step .* LevelSetSearch"):
        SymmetryTeleportCallback(reevaluate=False, search=LevelSetSearch(steps=2))
    with pytest.raises((TypeError, ValueError), match="`reevaluate` must be"):
        SymmetryTeleportCallback(reevaluate="no")  # type: ignore[arg-type]
