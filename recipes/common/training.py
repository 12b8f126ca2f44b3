"""Seeded training runs that print nothing and record what they see."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cost import MultiTaskMixin, SymmetryTeleportCallback, TeleportReport
from lightning_cost.triggers import TRIGGERS
from recipes.common.looks import is_looked_at

__all__ = ["Evaluation", "Look", "Measured", "Recorder", "be_a_quiet_worker", "train_and_test"]

# What Lightning says in every small run without loggers.
_CHATTER = (
    ".*isinstance.treespec, LeafSpec.. is deprecated",
    ".*does not have many workers",
    ".*GPU available but not used",
    "You are trying to `self.log",
)


@dataclass(frozen=True)
class Look:
    """A training step before any teleport.

    Attributes:
        step: Its number.
        losses: The task losses.
        conflict: Whether the task with the smallest gradient conflicts with the mean (Eq. 3).
        majority: Whether at least half of the tasks do (Eq. 4).
        weak: Whether any two tasks conflict with each other (Definition 1).
        cosine: Lowest cosine of a task gradient with the mean. Below 0, some task conflicts with the mean.
    """

    step: int
    losses: dict[str, float]
    conflict: bool
    majority: bool
    weak: bool
    cosine: float


@dataclass(frozen=True)
class Evaluation:
    """Metrics after a number of optimizer steps, and the CPU time of training so far, without evaluations."""

    step: int
    metrics: dict[str, float]
    seconds: float = field(default=math.nan, compare=False)


@dataclass(frozen=True)
class Measured:
    """What was measured in one run.

    Attributes:
        test: Test metrics after the last step.
        validation: Validation metrics along training.
        looks: The steps that were looked at.
        reports: The teleports that were tried. Only the first keeps its trace.
        steps: Number of optimizer steps.
        seconds: Wall-clock time of `trainer.fit`.
        cpu_seconds: CPU time of `trainer.fit`. Other programs on the machine affect it less.
        test_curve: Test metrics at the same steps as `validation`, if requested.
    """

    test: dict[str, float]
    validation: list[Evaluation]
    looks: list[Look]
    reports: list[TeleportReport]
    steps: int
    seconds: float
    cpu_seconds: float
    test_curve: list[Evaluation] = field(default_factory=list)

    def curve(self, split: Literal["validation", "test"]) -> list[Evaluation]:
        """The evaluations on one split."""
        return self.validation if split == "validation" else self.test_curve


class Recorder(Callback):
    """Records losses and conflict of one in n steps, and the metrics and the CPU time at every validation.

    Put it before the teleport callback: it then sees each step before the teleport. A step that is looked at takes
    longer if nothing else needs its task gradients. This extra time is left out of the recorded CPU time. It is the
    difference between these steps, which are drawn at random, and the others.

    Args:
        every: Look at one of so many optimizer steps; None: at no step.
        keep_weights: Whether to keep the weights of every validation, on the CPU.

    Attributes:
        looks: The steps that were looked at.
        evaluations: The metrics of every validation, by their names without `val/`.
        weights: The `state_dict` at each of them, if they are kept.
    """

    def __init__(self, every: int | None = 10, keep_weights: bool = False) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every={every} must be at least 1.")
        self.every, self.keep_weights = every, keep_weights
        self.looks: list[Look] = []
        self.evaluations: list[Evaluation] = []
        self.weights: list[dict[str, Tensor]] = []
        self._due = False
        self._train_began = self._batch_began = self._paused = self._evaluating = 0.0
        self._ended: float | None = None
        # CPU seconds and number of batches, first of the steps that were not looked at, then of the others.
        self._seconds, self._batches = [0.0, 0.0], [0, 0]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._train_began, self._evaluating, self._ended = time.process_time(), 0.0, None

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._batch_began = time.process_time()
        self._due = self.every is not None and is_looked_at(trainer.global_step, self.every)
        if self._due:
            assert isinstance(pl_module, MultiTaskMixin)
            pl_module.request_task_gradients()

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self._due:
            assert isinstance(pl_module, MultiTaskMixin)
            gradients, logged = pl_module.task_gradients, trainer.callback_metrics
            assert gradients is not None
            losses = {name: float(logged[f"train/{name}_loss"]) for name in gradients.names}
            flags = (TRIGGERS[name](gradients) for name in ("dominated", "majority", "weak"))
            self.looks.append(Look(trainer.global_step, losses, *flags, cosine=float(gradients.cosines.min())))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._seconds[self._due] += time.process_time() - self._batch_began
        self._batches[self._due] += 1

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = time.process_time()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.process_time() if self._ended is None else self._ended

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The module has logged its metrics of the whole epoch by now.
        seconds = self._paused - self._train_began - self._evaluating - self._extra_seconds()
        self.evaluations.append(Evaluation(trainer.global_step, _metrics(trainer, "val/"), seconds))
        if self.keep_weights:
            self.weights.append({name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()})
        self._evaluating += time.process_time() - self._paused

    def _extra_seconds(self) -> float:
        """CPU time of the steps that were looked at, beyond what the same number of other steps takes."""
        if 0 in self._batches:
            return 0.0
        return self._seconds[True] - self._batches[True] * self._seconds[False] / self._batches[False]


class _FirstReport(Callback):
    """Keeps the first report of teleports with its trace. The callback itself keeps the traces of the last few."""

    def __init__(self, teleport: SymmetryTeleportCallback) -> None:
        self.teleport = teleport
        self.first: list[TeleportReport] = []

    @override
    def on_train_batch_end(self, *args: object) -> None:
        """Take the report of the first teleport."""
        self.first = self.first or self.teleport.reports[:1]

    @property
    def reports(self) -> list[TeleportReport]:
        """All reports, of which the first alone has its trace."""
        return self.first + [replace(report, trace=[]) for report in self.teleport.reports[1:]]


def train_and_test(
    make_model: Callable[[], L.LightningModule],
    data: L.LightningDataModule,
    *,
    seed: int,
    epochs: int,
    compared: Callback | None = None,
    validate_every: int = 1,
    look_every: int | None = 10,
    test_curve: bool = False,
    accelerator: str = "cpu",
    callbacks: Sequence[Callback] = (),
) -> Measured:
    """Train from a seed for a number of epochs, then test the weights of the last step. No checkpoint is selected.

    Two runs that differ only in `compared` or in the method of the model start from the same weights. They see the same
    batches if the order of the batches depends on nothing but the data module.

    Args:
        make_model: Builds the model; called after seeding.
        data: Training, validation and test data.
        seed: Seed of the global random number generators.
        epochs: Number of epochs.
        compared: The callback whose effect is measured. The reports are those of a SymmetryTeleportCallback.
        validate_every: Validate after every n-th epoch, and after the last.
        look_every: Look at losses and conflict in one of so many steps; None: never.
        test_curve: Whether to test the weights of every validation too, after training. They are kept in memory until
            then, and the last are tested last.
        accelerator: That of the Trainer.
        callbacks: More callbacks to train with.
    """
    L.seed_everything(seed, verbose=False)
    model = make_model()
    recorder = Recorder(look_every, keep_weights=test_curve)
    first = _FirstReport(compared) if isinstance(compared, SymmetryTeleportCallback) else None
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=epochs,
        check_val_every_n_epoch=validate_every,
        num_sanity_val_steps=0,
        callbacks=[callback for callback in (recorder, compared, first, *callbacks) if callback is not None],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    began, began_cpu = time.perf_counter(), time.process_time()
    trainer.fit(model, data)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    steps = trainer.global_step
    if not recorder.evaluations or recorder.evaluations[-1].step != steps:
        trainer.validate(model, data, verbose=False)
    curve = []
    for weights, evaluation in zip(recorder.weights, recorder.evaluations, strict=test_curve):
        model.load_state_dict(weights)
        trainer.test(model, data, verbose=False)
        curve.append(replace(evaluation, metrics=_metrics(trainer, "test/")))
    if not curve:
        trainer.test(model, data, verbose=False)
    return Measured(
        test=_metrics(trainer, "test/"),
        validation=recorder.evaluations,
        looks=recorder.looks,
        reports=[] if first is None else first.reports,
        steps=steps,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        test_curve=curve,
    )


def be_a_quiet_worker() -> None:
    """Prepare a process for a run beside others: use one thread, and silence Lightning's usual messages."""
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
