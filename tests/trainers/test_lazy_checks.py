"""Lazy checks: one task and the mean are looked at, and all tasks only if that task conflicts."""

from __future__ import annotations

import itertools
import weakref
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torchjd.aggregation import UPGrad
from torchjd.scalarization import FAMO, UW, Random

from lightning_cost import DominatedConflict, SymmetryTeleportCallback, TaskGradients
from lightning_cost._training import accumulator
from lightning_cost._training.engine import Engine
from lightning_cost.triggers import dominated_conflict
from tests.support.ddp_runs import MissingNet, NormNet, Run, alone, none, scaler_plugins, train
from tests.support.nets import Batch, Net, fit, make_batches, make_trainer
from tests.support.ranks import RankPool
from tests.support.teleporting import NoisyNet, SaveAt, StatefulBatches, assert_same, teleporter, without_time
from tests.support.versions import UNSAFE_LOAD

pytestmark = pytest.mark.slow

NAMES = ("left", "right", "ink", "edge", "area")
# The fourth task has the smallest gradient at every step.
SCALES = (1.0, 0.5, 2.0, 0.02, 1.0)

LAZY = partial(teleporter, trigger=DominatedConflict(all_tasks_every=50))
EXACT = partial(teleporter, trigger=dominated_conflict)


class FiveTasks(Net):
    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method, NAMES, SCALES)


class NoisyTasks(NoisyNet):
    """With BatchNorm and dropout: a replay must see the same random numbers."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method, NAMES)
        self.scales = dict(zip(NAMES, SCALES, strict=True))


class Passes(L.Callback):
    """Counts the backward passes for single rows, by optimizer step. Put it after the teleport callback."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        self._count = 0
        ordinary = accumulator.task_gradient

        def counted(*args: Any) -> Any:
            self._count += 1
            return ordinary(*args)

        monkeypatch.setattr(accumulator, "task_gradient", counted)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.counts.append(self._count)
        self._count = 0


class Judged(DominatedConflict):
    """Never teleports, and keeps the rows that it was asked about by step."""

    def __init__(self, all_tasks_every: int = 50) -> None:
        super().__init__(all_tasks_every)
        object.__setattr__(self, "seen", [])

    def __call__(self, gradients: TaskGradients) -> bool:
        self.seen.append(TaskGradients(gradients.names, gradients.matrix.clone()))  # type: ignore[attr-defined]
        return False


def train_both(make: Any, method: Any = lambda: None, **settings: Any) -> list[tuple[Any, SymmetryTeleportCallback]]:
    runs = []
    for make_callback in (LAZY, EXACT):
        torch.manual_seed(0)
        module, callback = make(method()), make_callback()
        fit(module, make_batches(40, NAMES), callbacks=[callback], **settings)
        runs.append((module, callback))
    return runs


@pytest.mark.parametrize("make", [FiveTasks, NoisyTasks])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "method",
    [lambda: None, partial(UW, 5), Random, partial(FAMO, 5), UPGrad],
    ids=["LS", "UW", "RLW", "FAMO", "UPGrad"],
)
def test_the_decisions_and_the_training_are_those_of_full_checks(make: Any, method: Any, accumulate: int) -> None:
    (module, lazy), (reference, exact) = train_both(make, method, accumulate_grad_batches=accumulate)
    assert [report.step for report in lazy.reports] == [report.step for report in exact.reports]
    assert lazy.reports
    assert len(lazy.reports) < 40 // accumulate
    for one, two in zip(lazy.reports, exact.reports, strict=True):
        assert one.cosines_before == pytest.approx(two.cosines_before, abs=2e-3)
    for name, value in module.named_parameters():
        torch.testing.assert_close(value, reference.get_parameter(name), rtol=0, atol=2e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_expanded_rows_are_those_that_a_full_check_computes(accumulate: int) -> None:
    seen = []
    for every in (50, 1):
        torch.manual_seed(0)
        trigger = Judged(every)
        callback = SymmetryTeleportCallback(trigger=trigger, start_epoch=0)
        fit(NoisyTasks(), make_batches(60, NAMES), callbacks=[callback], accumulate_grad_batches=accumulate)
        seen.append(trigger.seen)  # type: ignore[attr-defined]
    conflicts = [rows for rows in seen[1][1:] if dominated_conflict(rows)]
    assert conflicts
    # The first check knows nothing yet, so it looks at all tasks.
    assert len(seen[0]) == 1 + len(conflicts)
    for rows, expected in zip(seen[0][1:], conflicts, strict=True):
        assert rows.names == expected.names
        torch.testing.assert_close(rows.matrix, expected.matrix, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("method", "passes"), [(lambda: None, 1), (partial(UW, 5), 2)], ids=["LS", "UW"])
def test_a_check_without_conflict_takes_one_backward_pass_for_any_number_of_tasks(
    monkeypatch: pytest.MonkeyPatch, method: Any, passes: int
) -> None:
    counts, trigger = Passes(monkeypatch), Judged(4)
    callback = SymmetryTeleportCallback(trigger=trigger, start_epoch=0)
    fit(FiveTasks(method()), make_batches(60, NAMES), callbacks=[callback, counts])
    assert counts.counts[0] == 5
    assert set(counts.counts) <= {passes, 4, 5}
    assert counts.counts.count(passes) >= 10
    # Without a conflict, every fourth check looks at all tasks.
    full = [step for step, count in enumerate(counts.counts) if count > passes]
    assert max(b - a for a, b in itertools.pairwise(full)) <= 4


def test_all_tasks_are_looked_at_in_time() -> None:
    trigger = Judged(3)

    class NeverSmallest(FiveTasks):
        """The task that is small at first is large later, so another one conflicts unseen until a full check."""

        def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
            losses = super().task_losses(batch, batch_idx)
            return {name: loss * (1000 if name == "edge" and batch_idx > 5 else 1) for name, loss in losses.items()}

    fit(
        NeverSmallest(),
        make_batches(20, NAMES),
        callbacks=[SymmetryTeleportCallback(trigger=trigger, start_epoch=0)],
    )
    smallest = [rows.names[int(rows.norms.argmin())] for rows in trigger.seen]  # type: ignore[attr-defined]
    assert smallest[0] == "edge"
    assert "edge" not in smallest[-3:]


def test_whoever_asks_for_all_rows_gets_them() -> None:
    class Reader(FiveTasks):
        read: list[Any] = []  # noqa: RUF012

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.request_task_gradients()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.read.append(self.task_gradients.names)
            super().on_before_optimizer_step(optimizer)

    module = Reader()
    module.read = []
    fit(module, make_batches(6, NAMES), callbacks=[SymmetryTeleportCallback(trigger=Judged(), start_epoch=0)])
    assert module.read == [NAMES] * 6


@pytest.mark.parametrize("late", [False, True])
def test_rows_may_be_asked_for_between_micro_batches(late: bool) -> None:
    class Reader(FiveTasks):
        asks_at = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx % 2 == self.asks_at:
                self.request_task_gradients()
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert self.task_gradients is not None
            read.append(self.task_gradients.matrix.clone())
            super().on_before_optimizer_step(optimizer)

    rows = []
    # Without a callback, a late request would give the rows of the second micro-batch alone.
    for asks_at, callbacks in ((int(late), [SymmetryTeleportCallback(trigger=Judged(), start_epoch=0)]), (0, [])):
        read: list[Tensor] = []
        torch.manual_seed(0)
        module = Reader()
        module.asks_at = asks_at
        fit(module, make_batches(8, NAMES), callbacks=callbacks, accumulate_grad_batches=2)
        rows.append(read)
    assert len(rows[0]) == 4
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=2e-6)


def test_no_graph_outlives_the_step() -> None:
    alive: list[Any] = []

    class Watched(FiveTasks):
        def features(self, batch: Batch) -> Tensor:
            features = super().features(batch)
            alive.append(weakref.ref(features))
            return features

    class Collect(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert [ref() for ref in alive] == [None] * len(alive)

    fit(
        Watched(),
        make_batches(6, NAMES),
        callbacks=[SymmetryTeleportCallback(trigger=Judged(), start_epoch=0), Collect()],
    )
    assert len(alive) >= 6


def test_a_resumed_run_looks_at_the_same_steps(tmp_path: Any) -> None:
    def run(path: Any = None, ckpt_path: Any = None) -> tuple[FiveTasks, SymmetryTeleportCallback, Any]:
        torch.manual_seed(0)
        module = FiveTasks()
        callback = teleporter(trigger=DominatedConflict(all_tasks_every=4))
        loader = StatefulBatches(make_batches(12, NAMES))
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback, *([] if path is None else [SaveAt(path, 6)])],
        )
        trainer.fit(module, loader, ckpt_path=ckpt_path, **UNSAFE_LOAD)
        return module, callback, trainer

    module, whole, _ = run(tmp_path / "a.ckpt")
    again, resumed, _ = run(ckpt_path=tmp_path / "a.ckpt")
    assert_same(dict(again.state_dict()), dict(module.state_dict()))
    assert without_time(resumed.reports, 6) == without_time(whole.reports, 6)
    assert resumed.state_dict()["lazy_checks"] == whole.state_dict()["lazy_checks"]


class Missing(FiveTasks):
    """A task without labels in every second batch."""

    absent = "left"

    def task_losses(self, batch: Batch, batch_idx: int) -> Any:
        return {**super().task_losses(batch, batch_idx), **({self.absent: None} if batch_idx % 2 else {})}


def test_a_task_without_labels_is_never_the_one() -> None:
    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            pair = Engine(pl_module).step.pair  # type: ignore[union-attr]
            watched.append(None if pair is None else pair.task)

    watched: list[str | None] = []
    module = Missing()
    module.absent = "edge"
    fit(module, make_batches(20, NAMES), callbacks=[SymmetryTeleportCallback(trigger=Judged(), start_epoch=0), Watch()])
    assert set(watched[::2]) == {None, "edge"}
    assert "edge" not in watched[1::2]


def test_decisions_are_the_same_without_labels_of_another_task() -> None:

    (module, lazy), (reference, exact) = train_both(Missing)
    assert [report.step for report in lazy.reports] == [report.step for report in exact.reports]
    for name, value in module.named_parameters():
        torch.testing.assert_close(value, reference.get_parameter(name), rtol=0, atol=2e-3)


def test_a_frozen_backbone_is_no_conflict() -> None:
    class Frozen(FiveTasks):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.backbone.requires_grad_(batch_idx >= 4)

    callback = LAZY()
    fit(Frozen(), make_batches(12, NAMES), callbacks=[callback])
    assert all(report.step >= 4 for report in callback.reports)


def test_two_ranks_equal_one_process(ranks: RankPool) -> None:
    for net in (Net, NormNet, MissingNet):
        for settings in ({}, {"accumulate_grad_batches": 2}):
            run = Run(none, net, callback=LAZY, trainer=settings)
            (first, second), single = ranks.run(train, run), alone(run)
            assert_same(second["parameters"], first["parameters"])
            steps = [[(report["step"], report["accepted"]) for report in r["reports"]] for r in (first, second, single)]
            assert steps[0] == steps[1] == steps[2]
            torch.testing.assert_close(first["parameters"], single["parameters"], rtol=0, atol=2e-4)


def test_a_gradient_scaler(ranks: RankPool) -> None:
    run = Run(none, callback=LAZY, plugins=scaler_plugins, trainer={"gradient_clip_val": 0.1})
    (first, second), single = ranks.run(train, run), alone(run)
    assert_same(second["reports"], first["reports"])
    torch.testing.assert_close(first["parameters"], single["parameters"], rtol=0, atol=0.02)


def test_a_compiled_backbone_may_be_differentiated_again() -> None:
    class Compiled(FiveTasks):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(self.backbone)
            self.backbone.compile(backend="aot_eager")

    callback = LAZY()
    fit(Compiled(), make_batches(20, NAMES), callbacks=[callback])
    assert callback.reports


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_all_tasks_every_is_a_positive_whole_number(every: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="all_tasks_every"):
        DominatedConflict(all_tasks_every=every)


def test_a_step_that_learns_one_rate_keeps_the_others() -> None:
    module = FiveTasks()
    fit(module, make_batches(6, NAMES), callbacks=[SymmetryTeleportCallback(trigger=Judged(), start_epoch=0)])
    assert set(Engine(module).state_dict()["rates"]) == set(NAMES)


def test_rows_that_overflow_are_named_when_all_are_looked_at() -> None:
    class Cancelling(FiveTasks):
        """Two rows that are infinite, and add up to nothing in `.grad`."""

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            step = Engine(self).step
            assert step is not None
            if step.pair is not None and step.accumulator is None:
                row = torch.full_like(self.backbone[0].weight, torch.inf)
                weight = self.backbone[0].weight
                step.graphs = {**step.graphs, "ink": (weight * row).sum()}  # type: ignore[dict-item]
                Engine(self).expand()
            super().on_before_optimizer_step(optimizer)

    with pytest.raises(ValueError, match=r"The gradient of task .*'ink'.* is not finite"):
        fit(Cancelling(), make_batches(6, NAMES), callbacks=[SymmetryTeleportCallback(trigger=Judged(), start_epoch=0)])


class Agreeing(FiveTasks):
    """Tasks without conflict, so that only the number of checks decides which of them look at all tasks."""

    def task_losses(self, batch: Batch, batch_idx: int) -> Any:
        shared = self.features(batch).square().mean()
        return {
            name: shared * scale + head.weight.square().sum()
            for (name, (head,)), scale in zip(self.heads.items(), SCALES, strict=True)
        }


def test_checks_without_conflict_are_counted_across_a_restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def counts_of(*callbacks: Any, ckpt_path: Any = None) -> list[int]:
        passes = Passes(monkeypatch)
        lazy = teleporter(trigger=DominatedConflict(all_tasks_every=4))
        trainer = make_trainer(callbacks=[lazy, passes, *callbacks])
        trainer.fit(Agreeing(), StatefulBatches(make_batches(12, NAMES)), ckpt_path=ckpt_path, **UNSAFE_LOAD)
        return passes.counts

    whole = counts_of(SaveAt(tmp_path / "a.ckpt", 6))
    # The first check knows nothing yet and looks at all. One row of five comes by subtraction later.
    assert whole == [5, 1, 1, 1, 4, 1, 1, 1, 4, 1, 1, 1]
    assert counts_of(ckpt_path=tmp_path / "a.ckpt") == whole[6:]


def test_a_check_learns_how_large_the_gradient_of_its_task_is() -> None:
    class Growing(Agreeing):
        """The gradient of the smallest task grows, and its loss does not, so another task becomes the smallest."""

        def task_losses(self, batch: Batch, batch_idx: int) -> Any:
            losses = super().task_losses(batch, batch_idx)
            edge = losses["edge"]
            return {**losses, "edge": edge if batch_idx < 2 else edge + 1000 * (edge - edge.detach())}

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            pair = Engine(pl_module).step.pair  # type: ignore[union-attr]
            watched.append(None if pair is None else pair.task)

    watched: list[str | None] = []
    module = Growing()
    module.make_optimizer = partial(torch.optim.SGD, lr=1e-9)
    fit(module, make_batches(10, NAMES), callbacks=[LAZY(), Watch()])
    assert watched[1] == "edge"
    assert watched[-1] != "edge"
