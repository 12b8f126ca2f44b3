"""What one teleport does, and what it costs: every search and objective on the same events of dominated conflict.

The events come from training the three balanced tasks of `recipes.digits` with the mean of the losses. At an event
every setting teleports from the same point on the same batch, its effect is measured there and on validation batches
that it has not seen, and everything is put back, so that training is that of plain linear scalarization. The cost of
the default is also measured on the ResNet-18 of `benchmarks.step` with three tasks.

Run `python -m benchmarks.teleport` for the tables, `--events-per-seed 2 --seeds 1` for a quick look.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.step import Images, Mixin, bare_trainer, quiet
from lightning_cost import (
    ConflictAlignment,
    GradientNorm,
    LevelSetSearch,
    Objective,
    PenaltySearch,
    RandomDirection,
    Reversed,
    SampledSharpness,
    Search,
)
from lightning_cost.gradients import GradientBuffer
from lightning_cost.invariance import drift
from lightning_cost.landscape import Landscape, Point
from lightning_cost.replay import RecordedBatch, without_trace
from lightning_cost.rng import RngState
from lightning_cost.teleport import Outcome, Teleporter
from lightning_cost.triggers import dominated_conflict
from recipes.digits.data import DigitsDataModule
from recipes.digits.model import DigitsModel

HELD_OUT_BATCHES = 8


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    search: Callable[[], Search]
    objective: Callable[[], Objective]
    rank: int = 5
    tolerance: float | None = 0.02


def settings() -> list[Setting]:
    """The default first, then variants of the level set search, controls, and the paper's search."""
    conflict = ConflictAlignment
    return [
        Setting("level set, LoRA 5, conflict (default)", LevelSetSearch, conflict),
        Setting("  2 steps", lambda: LevelSetSearch(steps=2), conflict),
        Setting("  4 steps", lambda: LevelSetSearch(steps=4), conflict),
        Setting("  rank 1", LevelSetSearch, conflict, rank=1),
        Setting("  full rank", lambda: LevelSetSearch(full_rank=True), conflict),
        Setting("  double backward", LevelSetSearch, lambda: ConflictAlignment(derivative="double_backward")),
        Setting("  gradient norm", LevelSetSearch, GradientNorm),
        Setting("  sharpness, Eq. 8", LevelSetSearch, lambda: SampledSharpness(form="difference")),
        Setting("  random direction (control)", LevelSetSearch, RandomDirection),
        Setting("  reversed conflict (control)", LevelSetSearch, lambda: Reversed(ConflictAlignment())),
        Setting("penalty, 20 steps, conflict", lambda: PenaltySearch(steps=20, lr=1e-3), conflict),
        Setting("penalty, 50 steps, conflict", lambda: PenaltySearch(steps=50, lr=1e-3), conflict),
        Setting("penalty, 30 steps, gradient norm", lambda: PenaltySearch(steps=30, lr=1e-3), GradientNorm),
        Setting(
            "penalty, 30 steps, gradient norm, no test",
            lambda: PenaltySearch(steps=30, lr=3e-3),
            GradientNorm,
            tolerance=None,
        ),
        Setting(
            "penalty, 30 steps, sharpness, Eq. 8",
            lambda: PenaltySearch(steps=30, lr=1e-3),
            lambda: SampledSharpness(form="difference"),
        ),
        Setting(
            "paper: penalty, 30 steps, Eq. 9, no test",
            lambda: PenaltySearch(steps=30, relative=False),
            SampledSharpness,
            tolerance=None,
        ),
    ]


@dataclass
class Event:
    """What one setting did at one event."""

    setting: str
    seed: int
    step: int
    accepted: bool
    drift: float
    drift_held_out: float
    cosine_before: float
    cosine_after: float
    resolved: bool
    held_out_conflict_before: float
    held_out_conflict_after: float
    norm_ratio: float
    forwards: int
    backwards: int
    seconds: float


@dataclass
class Reference:
    """Seconds of an ordinary step of the summed loss and of one with task gradients, without the optimizer."""

    plain: list[float] = field(default_factory=list)
    task_gradients: list[float] = field(default_factory=list)


class EventStudy(L.Callback):
    """Tries every setting at events of dominated conflict, and leaves training as it was."""

    def __init__(self, rows: list[Setting], seed: int, num_events: int, start: int, gap: int) -> None:
        super().__init__()
        self.rows = rows
        self.seed = seed
        self.num_events = num_events
        self.start = start
        self.gap = gap
        self.steps: list[int] = []
        self.events: list[Event] = []
        self.reference = Reference()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.request_task_gradients()
        pl_module.record_batches()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        step = trainer.global_step
        earliest = self.steps[-1] + self.gap if self.steps else self.start
        if step < earliest or not dominated_conflict(pl_module.task_gradients):
            return
        self.steps.append(step)
        held_out = [
            RecordedBatch(trainer.precision_plugin.convert_input(batch), index, RngState.capture(), torch.zeros(0))
            for index, batch in enumerate(trainer.datamodule.val_dataloader())
            if index < HELD_OUT_BATCHES
        ]
        with without_trace(pl_module):
            measure_reference(pl_module, self.reference, repetitions=12)
            for row in self.rows:
                self.events.append(self._try(row, pl_module, held_out, step))
        if len(self.steps) == self.num_events:
            trainer.should_stop = True

    def _try(self, row: Setting, module: Any, held_out: list[RecordedBatch], step: int) -> Event:
        landscape = Landscape(module, module.recorded_batches, torch.Generator())
        origin, grads = landscape.position(), landscape.grads()
        before = [_held_out(module, batch) for batch in held_out]
        outcome, seconds = timed_teleport(row, module, landscape)
        after = [_held_out(module, batch) for batch in held_out]
        landscape.go_back(origin, grads)
        mean_before = torch.stack([losses for losses, _ in before]).mean(dim=0)
        mean_after = torch.stack([losses for losses, _ in after]).mean(dim=0)
        return Event(
            setting=row.name,
            seed=self.seed,
            step=step,
            accepted=outcome.accepted,
            drift=drift(outcome.end.losses, outcome.start.losses, "per_task"),
            drift_held_out=drift(mean_after, mean_before, "per_task"),
            cosine_before=float(outcome.start.gradients.cosines.min()),
            cosine_after=float(outcome.end.gradients.cosines.min()),
            resolved=not dominated_conflict(outcome.end.gradients),
            held_out_conflict_before=statistics.mean(conflict for _, conflict in before),
            held_out_conflict_after=statistics.mean(conflict for _, conflict in after),
            norm_ratio=float(outcome.end.gradients.mean_norm / outcome.start.gradients.mean_norm),
            forwards=landscape.forwards,
            backwards=landscape.backwards,
            seconds=seconds,
        )


def timed_teleport(row: Setting, module: Any, landscape: Landscape) -> tuple[Outcome, float]:
    """Teleport twice from the same point, and time the second: the first allocates buffers and loads libraries."""
    origin, grads = landscape.position(), landscape.grads()
    start = Point(module.recorded_batches[0].losses, module.task_gradients)
    teleporter = Teleporter(row.objective(), row.search(), LoraConfig(r=row.rank), "per_task", row.tolerance)
    for _ in range(2):
        landscape.go_back(origin, grads)
        landscape.forwards = landscape.backwards = 0
        landscape.generator.manual_seed(0)
        began = time.perf_counter()
        outcome = teleporter.run(
            landscape, landscape, start, module.shared_modules(), learning_rate=1e-3, on_stage=lambda stage: None
        )
        seconds = time.perf_counter() - began
        if outcome.update is not None:
            teleporter.recycle(outcome.update)
    return outcome, seconds


def measure_reference(module: Any, reference: Reference, repetitions: int) -> None:
    """Time ordinary steps of the summed loss and steps with task gradients, in turns."""
    record = module.recorded_batches[0]
    landscape = Landscape(module, [record], torch.Generator())
    buffer = GradientBuffer()
    origin, grads = landscape.position(), landscape.grads()
    for _ in range(repetitions):
        for parameter in module.parameters():
            parameter.grad = None
        began = time.perf_counter()
        module.scalarize(module.evaluate_tasks(record.batch, record.batch_idx)).total.backward()
        reference.plain.append(time.perf_counter() - began)
        buffer.restart(module.task_gradients, record.losses.tolist())
        began = time.perf_counter()
        landscape.point(buffer)
        reference.task_gradients.append(time.perf_counter() - began)
    landscape.go_back(origin, grads)


def _held_out(module: Any, batch: RecordedBatch) -> tuple[Tensor, float]:
    buffer = GradientBuffer()
    point = Landscape(module, [batch], torch.Generator()).point(buffer)
    assert point is not None
    return point.losses, float(dominated_conflict(point.gradients))


class ResNetCost(L.Callback):
    """Times the default teleport at every step of the ResNet-18 of `benchmarks.step`."""

    def __init__(self) -> None:
        self.reference = Reference()
        self.rows: list[tuple[float, int, int, bool]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.request_task_gradients()
        pl_module.record_batches()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        with without_trace(pl_module):
            measure_reference(pl_module, self.reference, repetitions=2)
            landscape = Landscape(pl_module, pl_module.recorded_batches, torch.Generator())
            origin, grads = landscape.position(), landscape.grads()
            outcome, seconds = timed_teleport(settings()[0], pl_module, landscape)
            landscape.go_back(origin, grads)
        self.rows.append((seconds, landscape.forwards, landscape.backwards, outcome.accepted))


def resnet_cost(num_steps: int) -> str:
    """A line with the cost of the default teleport on ResNet-18 with three tasks."""
    cost = ResNetCost()
    torch.manual_seed(0)
    trainer = bare_trainer(max_epochs=1, callbacks=[cost])
    trainer.fit(Mixin(num_tasks=3), torch.utils.data.DataLoader(Images(num_steps), batch_size=None))
    seconds = statistics.median(row[0] for row in cost.rows)
    plain, with_rows = statistics.median(cost.reference.plain), statistics.median(cost.reference.task_gradients)
    passes = " + ".join(f"{statistics.mean(row[index] for row in cost.rows):.1f}" for index in (1, 2))
    return (
        f"ResNet-18, 3 tasks, batch 16, {len(cost.rows)} teleports, {sum(row[3] for row in cost.rows)} accepted:"
        f" {seconds / plain:.1f} plain steps, {seconds / with_rows:.1f} task-gradient steps, {passes} passes"
        f" (plain {plain * 1e3:.0f} ms, task gradients {with_rows * 1e3:.0f} ms)"
    )


def collect(rows: list[Setting], seeds: int, events_per_seed: int) -> tuple[list[Event], list[EventStudy]]:
    """Train once a seed and try every setting at its events."""
    studies = []
    for seed in range(seeds):
        study = EventStudy(rows, seed, events_per_seed, start=60, gap=40)
        L.seed_everything(seed, verbose=False)
        trainer = bare_trainer(max_steps=6000, callbacks=[study], limit_val_batches=0)
        tasks = ("left", "right", "ink")
        trainer.fit(DigitsModel(tasks), datamodule=DigitsDataModule(tasks=tasks, shuffle_seed=seed))
        studies.append(study)
    return [event for study in studies for event in study.events], studies


def summarize(events: list[Event], studies: list[EventStudy]) -> Table:
    """One row a setting."""
    plain = statistics.median(value for study in studies for value in study.reference.plain)
    with_rows = statistics.median(value for study in studies for value in study.reference.task_gradients)
    count = sum(len(study.steps) for study in studies)
    table = Table(
        title=f"{count} events of dominated conflict, 3 tasks, {len(studies)} seeds",
        caption=(
            "Medians of drift (largest relative change of a task loss; held out: on 8 unseen batches) and of the cost;"
            " means of the rest. A plain step is a forward and a backward pass of the summed loss, here"
            f" {plain * 1e3:.2f} ms; a task-gradient step {with_rows * 1e3:.2f} ms ({with_rows / plain:.2f} plain). The"
            " cost includes the task gradients at the new point, which the update needs in any case."
        ),
    )
    for heading in (
        "search, objective",
        "accepted",
        "drift batch / held out",
        "smallest cosine",
        "resolved",
        "held-out conflict",
        "gradient norm",
        "passes fwd + bwd",
        "cost: plain steps",
        "task-gradient steps",
    ):
        table.add_column(heading, justify="left" if heading.startswith("search") else "right")
    for name in dict.fromkeys(event.setting for event in events):
        rows = [event for event in events if event.setting == name]

        def mean(attribute: str, rows: list[Event] = rows) -> float:
            return statistics.mean(float(getattr(row, attribute)) for row in rows)

        def median(attribute: str, rows: list[Event] = rows) -> float:
            return statistics.median(float(getattr(row, attribute)) for row in rows)

        table.add_row(
            name,
            f"{mean('accepted'):.0%}",
            f"{median('drift'):.3f} / {median('drift_held_out'):.3f}",
            f"{mean('cosine_before'):.2f} -> {mean('cosine_after'):.2f}",
            f"{mean('resolved'):.0%}",
            f"{mean('held_out_conflict_before'):.2f} -> {mean('held_out_conflict_after'):.2f}",
            f"x {median('norm_ratio'):.2f}",
            f"{mean('forwards'):.1f} + {mean('backwards'):.1f}",
            f"{median('seconds') / plain:.1f}",
            f"{median('seconds') / with_rows:.1f}",
        )
    return table


def main() -> None:
    """Parse arguments, run, print the table and write every event to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--events-per-seed", type=int, default=12)
    parser.add_argument("--resnet-steps", type=int, default=8, help="teleports on ResNet-18; 0 to leave it out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/teleport.csv"))
    arguments = parser.parse_args()
    quiet(arguments.threads)
    events, studies = collect(settings(), arguments.seeds, arguments.events_per_seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(vars(events[0])))
        writer.writeheader()
        writer.writerows(vars(event) for event in events)
    console = Console(width=200)
    console.print(summarize(events, studies))
    if arguments.resnet_steps:
        console.print(resnet_cost(arguments.resnet_steps))


if __name__ == "__main__":
    main()
