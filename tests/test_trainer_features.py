"""Accumulation, clipping, schedules, validation and other callbacks beside task gradients and teleports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader
from torchjd.aggregation import Aggregator, FairGrad, UPGrad

from lightning_cost import PenaltySearch, SymmetryTeleportCallback
from lightning_cost._training.engine import engine_of
from lightning_cost._training.shared import shared_parameters
from lightning_cost.searches import LevelSetSearch, SearchContext
from tests.support.nets import TASKS, Batch, Net, PlainNet, fit, make_batches, make_mlp
from tests.support.teleporting import teleporter

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


def values_of(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def grads_of(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def assert_all_accepted(callback: SymmetryTeleportCallback, count: int) -> None:
    assert [report.accepted for report in callback.reports] == [True] * count


class ByHand(L.Callback):
    """Compares the gradients at each optimizer step with those of the window's batches at the parameters of now."""

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
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
        rows = [
            torch.cat([piece.flatten() for piece in torch.autograd.grad(scale * loss, shared, retain_graph=True)])
            for loss in summed.values()
        ]
        torch.testing.assert_close(pl_module.task_gradients.matrix, torch.stack(rows), rtol=1e-4, atol=1e-6)


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


def test_batches_are_kept_only_where_a_check_is_due() -> None:
    class Counts(L.Callback):
        def __init__(self) -> None:
            self.kept: list[int] = []

        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.kept.append(len(engine_of(pl_module).step.batches))

    counts = Counts()
    callbacks = [counts, teleporter(check_every_n_steps=2)]
    fit(Net(UPGrad()), make_batches(12), callbacks=callbacks, accumulate_grad_batches=3)
    assert counts.kept == [1, 2, 3, 0, 0, 0, 1, 2, 3, 0, 0, 0]


class Validated(Net):
    """With BatchNorm, whose modes validation switches, and a validation loader."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.backbone = nn.Sequential(make_mlp(5, 6), nn.BatchNorm1d(6), nn.Tanh(), make_mlp(6, 4))

    def val_dataloader(self) -> Any:
        return DataLoader(make_batches(2, seed=1), batch_size=None)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", sum(self.losses(batch).values()))


class Built(Validated):
    """Has no layer before the Trainer asks for them."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.backbone, self.heads = None, None

    def configure_model(self) -> None:
        if self.backbone is None:
            built = Validated()
            self.backbone, self.heads = built.backbone, built.heads


class Trajectory(L.Callback):
    """The parameters after each optimizer step, and at the start of each epoch."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.epochs: list[Tensor] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.epochs.append(values_of(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(values_of(pl_module))


class Training:
    """A way to train: with or without teleports at every step."""

    def __init__(self, method: Callable[[], Any], teleports: bool) -> None:
        self.method, self.teleports = method, teleports

    def run(
        self,
        make: Callable[[Any], L.LightningModule] = Validated,
        before: Any = (),
        after: Any = (),
        count: int = 5,
        idle: int = 0,
        **settings: Any,
    ) -> tuple[Any, Trajectory]:
        """Train on ready-made batches, without validation unless told otherwise; ``idle`` steps have no batch."""
        trajectory, teleport = Trajectory(), teleporter()
        module = make(self.method())
        callbacks = [*before, *([teleport] if self.teleports else []), *after, trajectory]
        settings = {"limit_val_batches": 0, "num_sanity_val_steps": 0, **settings}
        trainer = fit(module, make_batches(count), callbacks=callbacks, **settings)
        if self.teleports:
            assert len(teleport.reports) == trainer.global_step - idle
            assert any(report.accepted for report in teleport.reports)
        return module, trajectory


TRAININGS = {
    "teleports": Training(lambda: None, teleports=True),
    "UPGrad": Training(UPGrad, teleports=False),
    "UPGrad and teleports": Training(UPGrad, teleports=True),
}
trainings = pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
both_orders = pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])


@cache
def reference_run(training: Training, **settings: Any) -> tuple[Any, Trajectory]:
    """A run that several tests compare theirs with."""
    return training.run(**settings)


def assert_equal_runs(one: Any, two: Any) -> None:
    (module, trajectory), (other, expected) = one, two
    assert len(trajectory.steps) == len(expected.steps) > 0
    for step, wanted in zip(trajectory.steps, expected.steps, strict=True):
        assert torch.equal(step, wanted)
    state, wanted_state = module.state_dict(), other.state_dict()
    assert list(state) == list(wanted_state)
    assert all(torch.equal(state[key], wanted_state[key]) for key in state)


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
def test_settings_that_must_not_matter_do_not(
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
    # What is known of the size of the gradients decides which row comes by subtraction, that is the rounding.
    (one, _), (two, _) = again(stopped), again(fresh)
    torch.testing.assert_close(values_of(one), values_of(two), rtol=0, atol=1e-6)


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


def test_a_plateau_is_that_of_the_logged_losses() -> None:
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


OTHERS: dict[str, Callable[[Path], tuple[Any, dict[str, Any]]]] = {
    "EarlyStopping": lambda path: (EarlyStopping("val/loss", patience=100), {"limit_val_batches": 1.0}),
    "ModelCheckpoint": lambda path: (
        ModelCheckpoint(path, every_n_train_steps=2, save_on_exception=True),
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
    average = EMAWeightAveraging(decay=0.75)
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
