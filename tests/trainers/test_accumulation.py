"""Teleports with accumulated batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torchjd.aggregation import Aggregator, FairGrad, UPGrad

from lightning_cost import LevelSetSearch, PenaltySearch, SymmetryTeleportCallback
from lightning_cost._training.shared import shared_parameters
from tests.support.nets import TASKS, Batch, Net, fit, make_batches, values_of
from tests.support.teleporting import teleporter

pytestmark = pytest.mark.slow

METHODS: dict[str, Callable[[], Aggregator | None]] = {
    "None": lambda: None,
    "UPGrad": UPGrad,
    "FairGrad": lambda: FairGrad(1.0),
}


SEARCHES: dict[str, Callable[[], Any]] = {
    "level set": LevelSetSearch,
    "penalty": partial(PenaltySearch, steps=3, lr=3e-3),
}


methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


searches = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)


def assert_all_accepted(callback: SymmetryTeleportCallback, count: int) -> None:
    assert [report.accepted for report in callback.reports] == [True] * count


class ByHand(L.Callback):
    """Compares the gradients at each optimizer step with those of the window's batches at the current parameters."""

    def __init__(self) -> None:
        self.window: list[Batch] = []
        self.sizes: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.window.append(batch)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        window, self.window = self.window, []
        self.sizes.append(len(window))
        parameters, shared = list(pl_module.parameters()), shared_parameters(pl_module)
        weight = 1 if isinstance(pl_module.mtl_method, Aggregator) else 1 / len(TASKS)
        summed = {task: sum(pl_module.losses(batch)[task] for batch in window) for task in TASKS}
        scale = 1 / trainer.accumulate_grad_batches
        expected = torch.autograd.grad(weight * scale * sum(summed.values()), parameters, retain_graph=True)
        rows = torch.stack(
            [
                torch.cat([piece.flatten() for piece in torch.autograd.grad(scale * loss, shared, retain_graph=True)])
                for loss in summed.values()
            ]
        )
        torch.testing.assert_close(pl_module.task_gradients.matrix, rows, rtol=1e-4, atol=1e-6)
        found = torch.cat([parameter.grad.flatten() for parameter in parameters])
        gradient = torch.cat([piece.flatten() for piece in expected])
        if isinstance(pl_module.mtl_method, Aggregator):
            gradient[: rows.shape[1]] = pl_module.mtl_method(rows)
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "search"),
    [
        ("None", "level set"),
        ("None", "penalty"),
        ("UPGrad", "level set"),
        ("UPGrad", "penalty"),
        ("FairGrad", "level set"),
    ],
)
def test_after_a_teleport_grad_is_that_of_the_window_at_the_new_point(method: str, search: str) -> None:
    teleport, by_hand = teleporter(search=SEARCHES[search]()), ByHand()
    schedule = GradientAccumulationScheduler({0: 2, 1: 4, 2: 1})
    fit(Net(METHODS[method]()), make_batches(5), callbacks=[schedule, teleport, by_hand], max_epochs=3)
    assert by_hand.sizes == [2, 2, 1, 4, 1, 1, 1, 1, 1, 1]
    assert len(teleport.reports) == 10
    assert sum(report.accepted for report in teleport.reports) >= 8


@pytest.mark.parametrize(
    ("method", "search"),
    [("None", "level set"), ("UPGrad", "level set"), ("FairGrad", "level set"), ("UPGrad", "penalty")],
)
def test_an_incomplete_window_teleports_as_a_complete_one_and_steps_by_its_share(method: str, search: str) -> None:
    def run(factor: int) -> tuple[Net, Any]:
        module, teleport = Net(METHODS[method]()), teleporter(search=SEARCHES[search]())
        fit(module, make_batches(2), callbacks=[teleport], accumulate_grad_batches=factor)
        assert_all_accepted(teleport, 1)
        return module, teleport.reports[0]

    # The heads only: FairGrad is not linear in the gradients.
    complete, expected = run(factor=2)
    incomplete, report = run(factor=4)
    start = values_of(Net())
    for name in ("losses_before", "losses_after", "cosines_before", "cosines_after"):
        assert getattr(report, name) == pytest.approx(getattr(expected, name), abs=1e-5)
    assert report.drift == pytest.approx(expected.drift, abs=1e-5)
    assert report.grad_norm_after == pytest.approx(expected.grad_norm_after, rel=1e-4)
    assert report.sigma == pytest.approx(expected.sigma, abs=1e-4)
    heads = sum(parameter.numel() for parameter in complete.heads.parameters())
    steps = [(values_of(module) - start)[-heads:] for module in (complete, incomplete)]
    torch.testing.assert_close(steps[1], steps[0] / 2, rtol=1e-3, atol=1e-7)


def accumulated_and_whole(method: Callable[[], Any], search: Callable[[], Any], **settings: Any) -> list[Tensor]:
    """The parameters after 8 steps on four batches each, and on the fourfold batches."""
    small, found, decisions = make_batches(32), [], []
    large = [{key: torch.cat([b[key] for b in small[i : i + 4]]) for key in small[0]} for i in range(0, 32, 4)]
    for batches, factor in ((small, 4), (large, 1)):
        module, teleport = Net(method()), teleporter(search=search())
        fit(module, batches, callbacks=[teleport], accumulate_grad_batches=factor, **settings)
        found.append(values_of(module))
        decisions.append([report.accepted for report in teleport.reports])
    assert decisions[0] == decisions[1]
    assert len(decisions[0]) == 8
    assert sum(decisions[0]) >= 6
    return found


@searches
@methods
def test_four_accumulated_batches_teleport_and_train_as_the_fourfold_batch(
    method: Callable[[], Any], search: Callable[[], Any]
) -> None:
    torch.testing.assert_close(*accumulated_and_whole(method, search), rtol=0, atol=1e-5)


def test_a_search_with_large_steps_differs_by_rounding_alone() -> None:
    found = accumulated_and_whole(UPGrad, partial(PenaltySearch, steps=3), precision="64-true")
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


def test_accumulated_batches_teleport_like_one_large_batch() -> None:
    large = make_batches(6, size=32)
    small = [{key: value[i : i + 8] for key, value in batch.items()} for batch in large for i in range(0, 32, 8)]
    states, callbacks = [], [teleporter(), teleporter()]
    for callback, batches, factor in zip(callbacks, (large, small), (1, 4), strict=True):
        module = Net(UPGrad())
        fit(module, batches, callbacks=[callback], accumulate_grad_batches=factor)
        states.append(dict(module.state_dict()))
    assert sum(report.accepted for report in callbacks[0].reports) >= 3
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-5)
