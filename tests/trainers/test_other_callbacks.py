"""Other callbacks beside task gradients and teleports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_cost.searches import LevelSetSearch, SearchContext
from tests.support.nets import fit, grads_of, make_batches, values_of
from tests.support.teleporting import teleporter
from tests.support.trainings import (
    TRAININGS,
    Built,
    Training,
    Trajectory,
    Validated,
    assert_equal_runs,
    reference_run,
    trainings,
)
from tests.support.versions import needs_save_on_exception

pytestmark = pytest.mark.slow

both_orders = pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])


OTHERS: dict[str, Callable[[Path], tuple[Any, dict[str, Any]]]] = {
    "EarlyStopping": lambda path: (EarlyStopping("val/loss", patience=100), {"limit_val_batches": 1.0}),
    "ModelCheckpoint": lambda path: (
        ModelCheckpoint(path, every_n_train_steps=2),
        {"enable_checkpointing": True},
    ),
    "LearningRateMonitor": lambda path: (LearningRateMonitor("step"), {"logger": DummyLogger()}),
    "RichProgressBar": lambda path: (RichProgressBar(), {"enable_progress_bar": True}),
    "Timer": lambda path: (Timer(timedelta(hours=1)), {}),
}


@both_orders
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_callbacks_that_watch_change_nothing(
    other: Callable[[Path], tuple[Any, dict[str, Any]]], first: bool, tmp_path: Path
) -> None:
    training = TRAININGS["UPGrad and teleports"]
    callback, settings = other(tmp_path)
    before, after = ([callback], []) if first else ([], [callback])
    run = training.run(before=before, after=after, accumulate_grad_batches=2, **settings)
    assert_equal_runs(run, reference_run(training, accumulate_grad_batches=2))


@both_orders
def test_early_stopping_stops_after_the_epoch(first: bool) -> None:
    training = TRAININGS["UPGrad and teleports"]
    stop = EarlyStopping("val/loss", stopping_threshold=1e9)
    before, after = ([stop], []) if first else ([], [stop])
    stopped = training.run(before=before, after=after, max_epochs=3, limit_val_batches=1.0)
    assert_equal_runs(stopped, reference_run(training))


@needs_save_on_exception
@both_orders
def test_a_checkpoint_of_an_exception_in_a_teleport_has_the_weights_before_it(first: bool, tmp_path: Path) -> None:
    class Failing(LevelSetSearch):
        teleports = 0

        def candidates(self, context: SearchContext) -> Iterator[None]:
            self.teleports += 1
            for _ in super().candidates(context):
                if self.teleports == 4:
                    raise RuntimeError("found nothing")
                yield

    save, trajectory = ModelCheckpoint(tmp_path, save_on_exception=True), Trajectory()
    ours = teleporter(search=Failing())
    callbacks = [save, ours, trajectory] if first else [ours, save, trajectory]
    with suppress(RuntimeError):
        fit(Validated(), make_batches(8), callbacks=callbacks, limit_val_batches=0, enable_checkpointing=True)
    assert len(trajectory.steps) == 3
    (path,) = tmp_path.glob("*.ckpt")
    loaded = Validated()
    loaded.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert torch.equal(values_of(loaded), trajectory.steps[-1])


@pytest.mark.parametrize(
    ("training", "first", "make"),
    [
        ("teleports", True, Validated),
        ("teleports", False, Validated),
        ("UPGrad", True, Validated),
        ("UPGrad and teleports", True, Built),
        ("UPGrad and teleports", False, Built),
    ],
)
def test_an_exponential_average_is_that_of_the_weights_after_the_steps(
    training: str, first: bool, make: Callable[[Any], Any]
) -> None:
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("needs Lightning 2.6")
    average = callbacks.EMAWeightAveraging(decay=0.75)
    before, after = ([average], []) if first else ([], [average])
    settings = {"accumulate_grad_batches": 3, "max_epochs": 2}
    # Validation swaps the weights by the average, here in the middle of a window.
    module, trajectory = TRAININGS[training].run(
        make=make, before=before, after=after, limit_val_batches=1.0, val_check_interval=2, **settings
    )
    _, expected = reference_run(TRAININGS[training], **settings)
    assert all(torch.equal(*pair) for pair in zip(trajectory.steps, expected.steps, strict=True))
    value = trajectory.steps[0]
    for step in trajectory.steps[1:]:
        value = 0.75 * value + 0.25 * step
    torch.testing.assert_close(values_of(module), value)


@both_orders
@trainings
def test_stochastic_averages_are_those_of_the_weights_after_the_epochs(training: Training, first: bool) -> None:
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
    before, after = ([average], []) if first else ([], [average])
    # One epoch more renews the statistics of BatchNorm. Lightning ends it with the gradients of the step before.
    module, trajectory = training.run(before=before, after=after, max_epochs=3, idle=1)
    _, expected = reference_run(training, max_epochs=3)
    *steps, last = trajectory.steps
    assert len(steps) == len(expected.steps)
    assert all(torch.equal(*pair) for pair in zip(steps, expected.steps, strict=True))
    averaged = torch.stack(trajectory.epochs[1:3]).mean(dim=0)
    torch.testing.assert_close(trajectory.epochs[3], averaged)
    torch.testing.assert_close(last, averaged - 0.05 * torch.cat([gradient.flatten() for gradient in grads_of(module)]))
    reference = Validated()
    torch.nn.utils.vector_to_parameters(averaged, reference.parameters())
    inputs = torch.cat([batch["x"] for batch in make_batches(5)])
    torch.testing.assert_close(module.backbone[1].running_mean, reference.backbone[0](inputs).mean(dim=0))
