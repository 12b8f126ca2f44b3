"""One training run, quiet, seeded and measured."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cost import MultiTaskMixin, SymmetryTeleportCallback, TeleportReport
from lightning_cost.triggers import Trigger, dominated_conflict

__all__ = [
    "Evaluation",
    "Look",
    "Measured",
    "StepRecorder",
    "ValidationRecorder",
    "be_a_quiet_worker",
    "train_and_test",
]

# What Lightning has to say to every small run without loggers.
_CHATTER = (
    ".*isinstance.treespec, LeafSpec.. is deprecated",
    ".*does not have many workers",
    ".*GPU available but not used",
)


@dataclass(frozen=True)
class Look:
    """One training step, before any teleport.

    Attributes:
        step: Optimizer steps taken before it.
        losses: Task to its loss on the batch.
        conflict: Whether the trigger holds.
    """

    step: int
    losses: dict[str, float]
    conflict: bool

    @property
    def mean_loss(self) -> float:
        """Mean of the task losses."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True)
class Evaluation:
    """Metrics after a number of optimizer steps.

    Attributes:
        step: Optimizer steps taken.
        metrics: Name to value.
        seconds: CPU time of training until then, evaluations left out.
    """

    step: int
    metrics: dict[str, float]
    seconds: float = field(default=math.nan, compare=False)


@dataclass(frozen=True)
class Measured:
    """What came out of one run.

    Attributes:
        test: Test metrics after the last step.
        validation: Validation metrics along training.
        looks: The steps that were looked at.
        reports: The teleports that were tried.
        steps: Number of optimizer steps.
        seconds: Wall-clock time of `trainer.fit`.
        cpu_seconds: CPU time of it, which other work on the machine touches less.
        test_curve: Test metrics wherever validation metrics were taken, if they were asked for.
    """

    test: dict[str, float]
    validation: list[Evaluation]
    looks: list[Look]
    reports: list[TeleportReport]
    steps: int
    seconds: float
    cpu_seconds: float
    test_curve: list[Evaluation] = field(default_factory=list)


class StepRecorder(Callback):
    """Looks at task losses and conflict in every n-th step, the same way with and without a teleport callback.

    It must come before that callback in the Trainer's list, so that it sees the step before the teleport. A step in
    which nobody else needs task gradients takes longer when it is looked at: `extra_seconds` says by how much.

    Args:
        every: Look at every n-th optimizer step.
        trigger: What counts as conflict.

    Attributes:
        looks: What was seen.
    """

    def __init__(self, every: int = 10, trigger: Trigger = dominated_conflict) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1.")
        self.every = every
        self.trigger = trigger
        self.looks: list[Look] = []
        self._began = 0.0
        # CPU seconds and number of the batches of steps that were not looked at, and of those that were.
        self._seconds, self._batches = [0.0, 0.0], [0, 0]

    @property
    def extra_seconds(self) -> float:
        """CPU time of the steps that were looked at beyond what as many others take."""
        if 0 in self._batches:
            return 0.0
        return self._seconds[True] - self._batches[True] * self._seconds[False] / self._batches[False]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Ask for the task gradients and the losses of a step that is due."""
        self._began, self._due = time.process_time(), trainer.global_step % self.every == 0
        if self._due:
            assert isinstance(pl_module, MultiTaskMixin)
            pl_module.request_task_gradients()
            pl_module.record_batches()

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Note what the step looks like."""
        if self._due:
            assert isinstance(pl_module, MultiTaskMixin)
            gradients = pl_module.task_gradients
            assert gradients is not None
            losses = torch.stack([record.losses for record in pl_module.recorded_batches]).mean(dim=0)
            by_task = dict(zip(gradients.names, losses.tolist(), strict=True))
            self.looks.append(Look(trainer.global_step, by_task, self.trigger(gradients)))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Note how long it took."""
        self._seconds[self._due] += time.process_time() - self._began
        self._batches[self._due] += 1


class ValidationRecorder(Callback):
    """Keeps the metrics of every validation epoch.

    Args:
        recorder: What looks at steps, whose extra time does not count.
        keep_weights: Also keep the weights, on the CPU.

    Attributes:
        evaluations: The metrics, by their names without `val/`.
        weights: The `state_dict` at each of them, if they are kept.
    """

    def __init__(self, recorder: StepRecorder | None = None, keep_weights: bool = False) -> None:
        self.recorder = recorder
        self.keep_weights = keep_weights
        self.evaluations: list[Evaluation] = []
        self.weights: list[dict[str, Tensor]] = []
        self._began = self._paused = self._evaluating = 0.0
        self._ended: float | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._began, self._evaluating, self._ended = time.process_time(), 0.0, None

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock for good."""
        self._ended = time.process_time()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.process_time() if self._ended is None else self._ended

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the metrics, those that the module logs at the end of the epoch among them; the clock goes on."""
        seconds = self._paused - self._began - self._evaluating
        if self.recorder is not None:
            seconds -= self.recorder.extra_seconds
        self.evaluations.append(Evaluation(trainer.global_step, _metrics(trainer, "val/"), seconds))
        if self.keep_weights:
            self.weights.append({name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()})
        self._evaluating += time.process_time() - self._paused


def train_and_test(
    make_model: Callable[[], L.LightningModule],
    data: L.LightningDataModule,
    *,
    seed: int,
    epochs: int,
    teleport: SymmetryTeleportCallback | None = None,
    validate_every: int = 1,
    look_every: int | None = 10,
    test_curve: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Measured:
    """Train from a seed for a number of epochs, then test what the last step left: nothing is selected on the way.

    Two runs that differ in `teleport` or in the method of the model alone, start from the same weights and, if the
    data decide the batches themselves, see the same batches.

    Args:
        make_model: Builds the model; called after seeding.
        data: Training, validation and test data.
        seed: Seed of everything that draws from the global generators.
        epochs: Number of epochs.
        teleport: The callback to train with.
        validate_every: Validate after every n-th epoch, and after the last.
        look_every: Look at losses and conflict in every n-th step; None: never.
        test_curve: After training, also test the weights of every validation. They are kept in memory until then, and
            the last are tested last.
        callbacks: Others to train with.
    """
    L.seed_everything(seed, verbose=False)
    model = make_model()
    recorder = None if look_every is None else StepRecorder(look_every)
    validation = ValidationRecorder(recorder, keep_weights=test_curve)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        check_val_every_n_epoch=validate_every,
        num_sanity_val_steps=0,
        callbacks=[callback for callback in (recorder, teleport, validation, *callbacks) if callback is not None],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    began, began_cpu = time.perf_counter(), time.process_time()
    trainer.fit(model, data)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    steps = trainer.global_step
    if not validation.evaluations or validation.evaluations[-1].step != steps:
        trainer.validate(model, data, verbose=False)
    curve = []
    for weights, evaluation in zip(validation.weights, validation.evaluations, strict=test_curve):
        model.load_state_dict(weights)
        trainer.test(model, data, verbose=False)
        curve.append(replace(evaluation, metrics=_metrics(trainer, "test/")))
    if not curve:
        trainer.test(model, data, verbose=False)
    return Measured(
        test=_metrics(trainer, "test/"),
        validation=validation.evaluations,
        looks=[] if recorder is None else recorder.looks,
        reports=[] if teleport is None else teleport.reports,
        steps=steps,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        test_curve=curve,
    )


def be_a_quiet_worker() -> None:
    """Prepare a process for runs beside others: one thread, and nothing printed but what matters."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in _CHATTER:
        warnings.filterwarnings("ignore", message)


def _metrics(trainer: L.Trainer, prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(prefix)
    }
