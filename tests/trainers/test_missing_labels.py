"""A step is that of the tasks that have a gradient in it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd import aggregation, scalarization
from torchjd.aggregation import MGDA, CAGrad, Mean, UPGrad

from lightning_cost import SymmetryTeleportCallback, TaskGradients
from lightning_cost._training.engine import Engine
from tests.support.nets import TASKS, Net, assert_moved, fit, make_batches, values_of
from tests.support.resumed_run import REMEMBERING
from tests.support.task_rows import Watched, assert_rows
from tests.support.teleporting import SaveAt, teleporter

pytestmark = pytest.mark.slow

SGD = partial(torch.optim.SGD, lr=0.05)


class Partly(Net):
    """Lacks the labels of some tasks in some batches, and says so in one of three ways."""

    def __init__(
        self, mtl_method: Any = None, way: str = "None", missing: Any = lambda batch_idx: ("ink",), **kwargs: Any
    ) -> None:
        super().__init__(mtl_method, **kwargs)
        self.make_optimizer = SGD
        self.way, self.missing = way, missing

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses: dict[str, Tensor | None] = {**super().task_losses(batch, batch_idx)}
        for name in self.missing(batch_idx):
            if self.way == "None":
                losses[name] = None
            elif self.way == "left out":
                del losses[name]
            else:
                losses[name] = 0 * self.heads[name](self.features(batch)).sum()
        return losses


WAYS = ["None", "left out", "zero"]
TWO = ("left", "right")


def others(net: Any) -> Tensor:
    """The parameters but for the head of the task without labels."""
    return torch.cat([value.detach().flatten() for name, value in net.named_parameters() if "ink" not in name])


def two_tasks(mtl_method: Any = None) -> Net:
    net = Net(mtl_method, TWO)
    net.make_optimizer = SGD
    return net


def test_the_default_trigger_looks_at_the_tasks_that_have_labels() -> None:
    counts = {}
    for way in WAYS:
        callback = SymmetryTeleportCallback(start_epoch=0)
        fit(Partly(way=way), make_batches(24), callbacks=[callback])
        counts[way] = len(callback.reports)
    callback = SymmetryTeleportCallback(start_epoch=0)
    fit(two_tasks(), make_batches(24), callbacks=[callback])
    # The mean of two losses has another weight than that of three, so that the runs differ after some steps.
    assert counts["None"] == counts["left out"] == counts["zero"] > 0
    assert len(callback.reports) > 0


AGGREGATORS: dict[str, Any] = {
    "UPGrad": UPGrad,
    "MGDA": MGDA,
    "CAGrad": lambda: CAGrad(c=0.5),
    "Mean": Mean,
    "IMTLG": aggregation.IMTLG,
    "DualProj": aggregation.DualProj,
    "AlignedMTL": aggregation.AlignedMTL,
    "ConFIG": aggregation.ConFIG,
    "FairGrad": lambda: aggregation.FairGrad(alpha=1.0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_combines_the_tasks_that_have_a_gradient(name: str, way: str) -> None:
    batches = make_batches(6)
    module, expected = Partly(AGGREGATORS[name](), way), two_tasks(AGGREGATORS[name]())
    fit(module, batches)
    fit(expected, batches)
    assert not torch.equal(values_of(module.backbone), values_of(Net().backbone))
    torch.testing.assert_close(others(module), others(expected), rtol=0, atol=1e-5)
    assert Engine(module).names == (TASKS if way != "left out" else TWO)


@pytest.mark.parametrize("way", ["None", "zero"])
def test_linear_scalarization_gives_each_task_the_same_weight_in_every_step(way: str) -> None:
    batches = make_batches(6)
    module, expected = Partly(None, way), two_tasks()
    # Two of three: the weight of a task does not depend on who else has labels.
    expected.make_optimizer = partial(torch.optim.SGD, lr=0.05 * 2 / 3)
    fit(module, batches)
    fit(expected, batches)
    torch.testing.assert_close(others(module), others(expected), rtol=0, atol=1e-6)


SCALARIZERS: dict[str, Any] = {
    "UW": scalarization.UW,
    "IMTL-L": scalarization.IMTLL,
    "FAMO": scalarization.FAMO,
    "geometric mean": lambda count: scalarization.GeometricMean(),
    "STCH": lambda count: scalarization.STCH(1.0),
}


@pytest.mark.parametrize("name", SCALARIZERS)
def test_a_scalarizer_weighs_the_tasks_that_have_a_loss(name: str) -> None:
    batches, make = make_batches(6), SCALARIZERS[name]
    module, expected = Partly(make(3)), two_tasks(make(2))
    fit(module, batches)
    fit(expected, batches)
    keep = [key for key, _ in module.named_parameters() if not key.startswith("mtl_method") and "ink" not in key]
    for key in keep:
        torch.testing.assert_close(module.get_parameter(key), expected.get_parameter(key), rtol=0, atol=1e-5)
    for own, other in zip(module.mtl_method.parameters(), expected.mtl_method.parameters(), strict=True):
        # FAMO's own optimizer regularizes the logits, all by the same factor.
        torch.testing.assert_close(own[:2] - own[0], other - other[0], rtol=0, atol=2e-3)
        assert float(own[2].abs()) < 2e-3


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("callbacks", [[], ["teleports"]], ids=["plain", "teleports"])
def test_every_method_that_remembers_trains_with_tasks_that_come_and_go(name: str, callbacks: Any) -> None:
    gone = [(), ("ink",), ("left",), ("left", "right"), (), ("right",)]
    module = Partly(REMEMBERING[name](), missing=lambda batch_idx: gone[batch_idx])
    callback = teleporter()
    fit(module, make_batches(6), callbacks=[callback] if callbacks else [], max_epochs=3)
    assert_moved(module)
    assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())
    if callbacks:
        assert any(report.accepted for report in callback.reports)


@pytest.mark.parametrize(
    ("name", "attribute"), [("GradVac", "_phi_t"), ("PCD", "_sq_norm_ema"), ("ExcessMTL", "_sq_grad_sum")]
)
def test_what_a_method_remembers_of_a_missing_task_rests(name: str, attribute: str) -> None:
    seen = []

    class Looking(Partly):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            part = next(part for part in self.mtl_method.modules() if hasattr(part, attribute))
            seen.append(getattr(part, attribute).clone())

    module = Looking(REMEMBERING[name](), missing=lambda batch_idx: ("ink",) if batch_idx == 3 else ())
    fit(module, make_batches(6))
    before, after, later = seen[2], seen[3], seen[4]
    assert torch.equal(after[2], before[2])
    assert not torch.equal(after[:2], before[:2])
    assert not torch.equal(later[2], after[2])


class WatchedPartly(Watched, Partly):
    """The rows, with zeros for what is missing."""

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        zero = 0 * sum(parameter.sum() for parameter in self.backbone.parameters())
        found = {name: self.by_task.get(name) for name in TASKS}
        self.by_task = {name: zero if loss is None else loss for name, loss in found.items()}
        super().backward(loss, *args, **kwargs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.request_task_gradients()


@pytest.mark.parametrize("method", [None, UPGrad()], ids=["LS", "UPGrad"])
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_tasks_that_come_and_go_between_micro_batches(method: Any, way: str) -> None:
    # In every window each task has a loss at least once.
    gone = [(), ("ink",), ("left",), (), ("right",), ("ink",), ("ink", "left"), ("right", "left")]
    module = WatchedPartly(method, way, missing=lambda batch_idx: gone[batch_idx % 8])
    fit(module, make_batches(16), accumulate_grad_batches=4)
    assert_rows(module, steps=4)


def test_a_task_without_a_loss_in_the_whole_step_has_no_row() -> None:
    module = Partly(UPGrad())
    fit(module, make_batches(4), accumulate_grad_batches=2, callbacks=[callback := teleporter()])
    assert module.task_gradients.names == TWO
    assert all(list(report.losses_before) == list(TWO) for report in callback.reports)
    assert all(set(report.cosines_after) == set(TWO) for report in callback.reports)


def test_a_loss_of_zero_is_held_but_does_not_count_for_conflict() -> None:
    callback = teleporter()
    fit(Partly(way="zero"), make_batches(4), callbacks=[callback])
    accepted = [report for report in callback.reports if report.accepted]
    assert accepted
    assert all(report.losses_after["ink"] == 0 for report in accepted)
    assert all(set(report.cosines_after) == set(TWO) for report in accepted)


@pytest.mark.parametrize("method", [None, UPGrad()], ids=["LS", "UPGrad"])
def test_a_trigger_gets_two_tasks_or_is_not_asked(method: Any) -> None:
    asked: list[tuple[str, ...]] = []

    def trigger(gradients: TaskGradients) -> bool:
        asked.append(gradients.names)
        return True

    gone = [("ink",), ("left", "ink"), (), ("left", "right", "ink")]
    module = Partly(method, missing=lambda batch_idx: gone[batch_idx])
    fit(module, make_batches(4), callbacks=[teleporter(trigger=trigger)])
    assert asked == [TWO, TASKS]


@pytest.mark.parametrize("method", [None, UPGrad(), scalarization.DWA(), scalarization.FAMO(3)], ids=str)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_batch_without_any_labels_is_skipped(method: Any, accumulated: int) -> None:
    def run(batches: Any, missing: Any) -> Tensor:
        module = Partly(method, missing=missing)
        fit(module, batches, accumulate_grad_batches=accumulated)
        return values_of(module.backbone)

    batches = make_batches(6)
    with_gaps = run(batches, lambda batch_idx: TASKS if batch_idx in (2, 3) else ())
    if accumulated == 1 and method is None:
        assert torch.equal(with_gaps, run([*batches[:2], *batches[4:]], lambda batch_idx: ()))
    assert bool(torch.isfinite(with_gaps).all())


def test_losses_are_logged_for_the_tasks_that_have_one() -> None:
    trainer = fit(Partly(missing=lambda batch_idx: ("ink",)), make_batches(2))
    assert set(trainer.callback_metrics) == {"train/loss", "train/left_loss", "train/right_loss"}


def test_a_resumed_run_knows_the_tasks_that_have_been_seen(tmp_path: Path) -> None:
    """The batch that it begins with lacks two of them."""
    gone = [(), (), ("left", "right"), (), ("ink",), ()]

    def build(**settings: Any) -> tuple[Partly, dict[str, Any]]:
        return Partly(None, "left out", missing=lambda batch_idx: gone[batch_idx]), settings

    batches = make_batches(6)
    whole, settings = build()
    fit(whole, batches, callbacks=[SaveAt(tmp_path / "saved.ckpt", 2)], **settings)
    resumed, _ = build()
    fit(resumed, batches[2:] + batches[:2], ckpt_path=tmp_path / "saved.ckpt")
    assert Engine(resumed).names == TASKS
