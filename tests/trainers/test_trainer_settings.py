"""Validation, clipping, schedules and time limits beside task gradients and teleports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torchjd.aggregation import UPGrad

from lightning_cost._training.shared import shared_parameters
from lightning_cost.searches import LevelSetSearch, SearchContext
from tests.support.nets import Net, PlainNet, fit, grads_of, make_batches, values_of
from tests.support.teleporting import teleporter
from tests.support.trainings import TRAININGS, Built, Training, Validated, assert_equal_runs, reference_run, trainings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"detect_anomaly": True}, {}),
        ({"num_sanity_val_steps": 2, "limit_val_batches": 1.0}, {}),
        ({"limit_val_batches": 1.0, "val_check_interval": 3}, {}),
        (
            {"limit_val_batches": 1.0, "val_check_interval": 2, "accumulate_grad_batches": 4, "count": 10},
            {"accumulate_grad_batches": 4, "count": 10},
        ),
        ({"overfit_batches": 2, "max_epochs": 3}, {"count": 2, "max_epochs": 3}),
        ({"fast_dev_run": 2}, {"max_steps": 2}),
        ({"make": Built}, {}),
    ],
    ids=[
        "detect_anomaly",
        "sanity check",
        "validation in an epoch",
        "validation in a window",
        "overfit_batches",
        "fast_dev_run",
        "configure_model",
    ],
)
@pytest.mark.parametrize("training", ["teleports", "UPGrad"])
def test_settings_that_do_not_change_the_training(
    training: str, settings: dict[str, Any], reference: dict[str, Any]
) -> None:
    assert_equal_runs(TRAININGS[training].run(**settings), reference_run(TRAININGS[training], **reference))


@trainings
def test_a_time_limit_ends_training_between_two_steps(training: Training) -> None:
    module, trajectory = training.run(
        max_time=timedelta(seconds=0.1), min_steps=2, max_epochs=1000, accumulate_grad_batches=3, count=9
    )
    steps = len(trajectory.steps)
    assert 2 <= steps < 3000
    _, expected = training.run(max_steps=steps, max_epochs=1000, accumulate_grad_batches=3, count=9)
    assert torch.equal(values_of(module), expected.steps[-1])


@trainings
def test_a_window_that_was_stopped_leaves_nothing_for_the_next_fit(training: Training) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.fit_loop.batch_idx == 5

    stopped, _ = training.run(after=[Stop()], accumulate_grad_batches=4, count=8)

    def again(module: Any) -> Any:
        return training.run(make=lambda method: module, accumulate_grad_batches=2, count=4)

    fresh = Validated(training.method())
    fresh.load_state_dict(stopped.state_dict())
    assert any(parameter.grad is not None for parameter in stopped.parameters())
    # What is known of the size of the gradients decides which row comes by subtraction, that is the rounding. The
    # finite difference of a teleport multiplies it by 200.
    (one, _), (two, _) = again(stopped), again(fresh)
    torch.testing.assert_close(values_of(one), values_of(two), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 0.1), ("value", 0.02)])
@trainings
def test_clipping_sees_what_the_step_would_take(training: Training, algorithm: str, limit: float) -> None:
    class Clipped(Net):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            before, matrix = values_of(self), self.task_gradients.matrix
            shared = shared_parameters(self)
            aggregated = matrix.mean(dim=0) if self.mtl_method is None else self.mtl_method(matrix)
            gradient = torch.cat([parameter.grad.flatten() for parameter in shared])
            torch.testing.assert_close(gradient, aggregated, rtol=1e-4, atol=1e-6)
            unclipped = grads_of(self)
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            norm = torch.nn.utils.get_total_norm(unclipped)
            for clipped, old in zip(grads_of(self), unclipped, strict=True):
                expected = old.clamp(-limit, limit) if algorithm == "value" else old * min(1, limit / (norm + 1e-6))
                torch.testing.assert_close(clipped, expected)
            self.expected = before - 0.05 * torch.cat([gradient.flatten() for gradient in grads_of(self)])
            self.clipped = any(not torch.equal(*pair) for pair in zip(grads_of(self), unclipped, strict=True))

        def on_train_batch_end(self, *args: Any) -> None:
            assert self.clipped
            torch.testing.assert_close(values_of(self), self.expected)

    _, trajectory = training.run(make=Clipped, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    assert len(trajectory.steps) == 5


def every_step(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": StepLR(optimizer, 2, gamma=0.5), "interval": "step"}


def every_epoch(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": StepLR(optimizer, 1, gamma=0.5), "interval": "epoch"}


class Rates(L.Callback):
    """The learning rate of each optimizer step, and the loss that was logged last in each epoch."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.losses.append(float(trainer.callback_metrics.get("train/loss", 0)))


class RateSearch(LevelSetSearch):
    """Remembers the learning rates that it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def candidates(self, context: SearchContext) -> Iterator[None]:
        self.rates.append(context.learning_rate)
        yield from super().candidates(context)


@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
@pytest.mark.parametrize("schedule", [every_step, every_epoch])
def test_learning_rates_are_those_of_plain_lightning_and_the_search_knows_them(
    schedule: Callable[[Any], Any], accumulate_grad_batches: int
) -> None:
    search, found = RateSearch(), []
    for module, callbacks in ((PlainNet(), []), (Net(UPGrad()), [teleporter(search=search)])):
        rates, optimizer = Rates(), torch.optim.SGD(module.parameters(), lr=0.05)
        configured = {"optimizer": optimizer, "lr_scheduler": schedule(optimizer)}
        module.configure_optimizers = lambda configured=configured: configured
        settings = {"max_epochs": 3, "accumulate_grad_batches": accumulate_grad_batches}
        fit(module, make_batches(4), callbacks=[*callbacks, rates], **settings)
        found.append(rates.rates)
    assert found[0] == found[1] == search.rates
    assert len(set(found[0])) >= 3


def test_a_plateau_scheduler_follows_the_logged_losses() -> None:
    rates = Rates()
    module = Net(UPGrad())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    plateau = partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.1)
    module.configure_optimizers = lambda: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": plateau(optimizer), "monitor": "train/loss"},
    }
    fit(module, make_batches(3), callbacks=[teleporter(), rates], max_epochs=5)
    reference = torch.optim.SGD([torch.zeros(1)], lr=0.05)
    scheduler, expected = plateau(reference), []
    for loss in rates.losses:
        expected += [reference.param_groups[0]["lr"]] * 3
        scheduler.step(loss)
    assert rates.rates == expected
    assert len(set(expected)) >= 2
