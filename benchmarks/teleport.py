"""What one teleport does, and what it costs: every search and objective on the same events of dominated conflict.

The events come from training the three balanced tasks of `recipes.digits` with the mean of the losses, in a plain
PyTorch loop: a teleport needs no Trainer. At an event every setting teleports from the same point on the same batch.
Its effect is measured there and on validation batches that it has not seen. Then everything is put back, so that
training is that of plain linear scalarization. The cost of the default is also measured on the ResNet-18 of
`benchmarks.step` with three tasks.

Run `python -m benchmarks.teleport` for the tables, `--events-per-seed 2 --seeds 1` for a quick look.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.networks import NETWORKS
from benchmarks.step import Mixin, quiet
from lightning_cost import (
    ConflictAlignment,
    GradientNorm,
    LevelSetSearch,
    Objective,
    Outcome,
    PenaltySearch,
    Point,
    RandomDirection,
    Reversed,
    SampledSharpness,
    Search,
    Surface,
    Teleporter,
)
from lightning_cost._teleport.choices import choose_search
from lightning_cost.triggers import dominated_conflict
from recipes.digits.data import DigitsDataModule
from recipes.digits.model import DigitsModel

HELD_OUT_BATCHES = 8
MEAN_TERM = partial(ConflictAlignment, terms="mean")


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    search: Callable[[], Search]
    objective: Callable[[], Objective]
    tolerance: float | None = 0.02
    reevaluate: bool = True


def settings() -> list[Setting]:
    """The default first, then variants of the level set search, controls, and the paper's search."""
    conflict = ConflictAlignment
    return [
        Setting("level set, LoRA 5, conflict (default)", LevelSetSearch, conflict),
        Setting("  mean term", LevelSetSearch, MEAN_TERM),
        Setting("  deferred", partial(choose_search, "level_set", False), MEAN_TERM, reevaluate=False),
        Setting(
            "  deferred, random direction (control)",
            partial(choose_search, "level_set", False),
            RandomDirection,
            reevaluate=False,
        ),
        Setting("  2 steps", lambda: LevelSetSearch(steps=2), conflict),
        Setting("  4 steps", lambda: LevelSetSearch(steps=4), conflict),
        Setting("  rank 1", lambda: LevelSetSearch(rank=1), conflict),
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


class Clock:
    """Seconds of ordinary steps of the mean loss and of steps with task gradients, without the optimizer."""

    def __init__(self) -> None:
        self.plain: list[float] = []
        self.task_gradients: list[float] = []

    def measure(self, model: L.LightningModule, surface: Surface, batch: Any, start: Point, repetitions: int) -> None:
        """Time both kinds of steps in turns, and leave the gradients as they were."""
        grads, spare = surface.grads(), torch.empty_like(start.gradients.matrix)
        for _ in range(repetitions):
            surface.set_grads([None] * len(grads))
            began = time.perf_counter()
            torch.stack(list(model.task_losses(batch, 0).values())).mean().backward()
            self.plain.append(time.perf_counter() - began)
            began = time.perf_counter()
            surface.point(start, spare)
            self.task_gradients.append(time.perf_counter() - began)
        surface.set_grads(grads)


def shared_of(model: L.LightningModule) -> nn.Module:
    """The shared module."""
    return model.get_submodule(model.shared_module)


def surface_of(model: L.LightningModule, batch: Any) -> Surface:
    """The task losses of a batch as a function of the backbone's parameters."""
    return Surface(
        lambda: model.task_losses(batch, 0), list(shared_of(model).parameters()), parameters=list(model.parameters())
    )


def timed_teleport(row: Setting, surface: Surface, backbone: nn.Module, start: Point) -> tuple[Outcome, float]:
    """Teleport twice from the same point, and time the second: the first allocates memory and loads libraries."""
    origin, grads = surface.position(), surface.grads()
    teleporter = Teleporter(row.objective(), row.search(), tolerance=row.tolerance, reevaluate=row.reevaluate)
    for _ in range(2):
        surface.go_back(origin, grads)
        surface.generator.manual_seed(0)
        began = time.perf_counter()
        outcome = teleporter.run(surface, {"backbone": backbone}, start)
        seconds = time.perf_counter() - began
        if outcome.accepted and row.reevaluate:
            teleporter.recycle(outcome.end.gradients.matrix)
    return outcome, seconds


def try_setting(
    row: Setting, model: DigitsModel, surface: Surface, start: Point, held_out: list[Surface], seed: int, step: int
) -> Event:
    """Teleport by one setting, measure what it did, and put everything back."""
    origin, grads = surface.position(), surface.grads()
    before = [other.point() for other in held_out]
    surface.set_grads(grads)
    outcome, seconds = timed_teleport(row, surface, model.backbone, start)
    end = outcome.end if row.reevaluate else surface.point()
    after = [other.point() for other in held_out]
    surface.go_back(origin, grads)
    return Event(
        setting=row.name,
        seed=seed,
        step=step,
        accepted=outcome.accepted,
        drift=largest_change(end.losses, start.losses),
        drift_held_out=largest_change(mean_losses(after), mean_losses(before)),
        cosine_before=float(start.gradients.cosines.min()),
        cosine_after=float(end.gradients.cosines.min()),
        resolved=not dominated_conflict(end.gradients),
        held_out_conflict_before=conflict_share(before),
        held_out_conflict_after=conflict_share(after),
        norm_ratio=float(end.gradients.mean_norm / start.gradients.mean_norm),
        forwards=outcome.forwards,
        backwards=outcome.backwards,
        seconds=seconds,
    )


def largest_change(losses: Tensor, reference: Tensor) -> float:
    """The largest relative change of a loss."""
    return float(((losses - reference) / reference).abs().max())


def mean_losses(points: list[Point]) -> Tensor:
    """The task losses, averaged over batches."""
    return torch.stack([point.losses for point in points]).mean(dim=0)


def conflict_share(points: list[Point]) -> float:
    """The share of batches with dominated conflict."""
    return statistics.mean(float(dominated_conflict(point.gradients)) for point in points)


def collect(rows: list[Setting], seeds: int, events_per_seed: int) -> tuple[list[Event], Clock]:
    """Train once a seed and try every setting at its events, the first of them after some steps, the rest apart."""
    events, clock = [], Clock()
    for seed in range(seeds):
        found, earliest = 0, 60
        for step, (model, surface, start, batch, held_out) in enumerate(train(seed)):
            if step >= earliest and dominated_conflict(start.gradients):
                clock.measure(model, surface, batch, start, repetitions=12)
                events += [try_setting(row, model, surface, start, held_out, seed, step) for row in rows]
                found, earliest = found + 1, step + 40
            if found == events_per_seed:
                break
    return events, clock


def train(seed: int) -> Iterator[tuple[DigitsModel, Surface, Point, Any, list[Surface]]]:
    """Train three tasks on the mean of the losses, and yield before each optimizer step."""
    L.seed_everything(seed, verbose=False)
    tasks = ("left", "right", "ink")
    model, data = DigitsModel(tasks), DigitsDataModule(tasks=tasks, shuffle_seed=seed)
    data.setup("fit")
    loader, optimizer = data.train_dataloader(), torch.optim.Adam(model.parameters(), lr=1e-3)
    validation = [batch for index, batch in enumerate(data.val_dataloader()) if index < HELD_OUT_BATCHES]
    for epoch in range(100):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            surface = surface_of(model, batch)
            held_out = [surface_of(model, other) for other in validation]
            yield model, surface, surface.point(), batch, held_out
            optimizer.step()


def resnet_cost(row: Setting, num_steps: int) -> str:
    """A line with the cost of a teleport on ResNet-18 with three tasks."""
    torch.manual_seed(0)
    network, rows, clock = NETWORKS["resnet18"], [], Clock()
    model, batch = Mixin(network, num_tasks=3), network.batch()
    for head in model.network.heads:
        # The tasks of `benchmarks.step` agree.
        head.reset_parameters()
    model.targets.copy_(torch.linspace(-1, 1, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for _ in range(num_steps):
        surface = surface_of(model, batch)
        start = surface.point()
        clock.measure(model, surface, batch, start, repetitions=2)
        origin, grads = surface.position(), surface.grads()
        rows.append(timed_teleport(row, surface, model.network.shared, start))
        surface.go_back(origin, grads)
        optimizer.step()
    seconds = statistics.median(seconds for _, seconds in rows)
    plain, with_rows = statistics.median(clock.plain), statistics.median(clock.task_gradients)
    forwards = statistics.mean(outcome.forwards for outcome, _ in rows)
    backwards = statistics.mean(outcome.backwards for outcome, _ in rows)
    accepted = sum(outcome.accepted for outcome, _ in rows)
    return (
        f"{row.name.strip()}, ResNet-18, 3 tasks, batch 16, {len(rows)} teleports,"
        f" {accepted} accepted: {seconds / plain:.1f} plain steps, {seconds / with_rows:.1f} task-gradient steps,"
        f" {forwards:.1f} + {backwards:.1f} passes"
        f" (plain {plain * 1e3:.0f} ms, task gradients {with_rows * 1e3:.0f} ms)"
    )


def summarize(events: list[Event], clock: Clock) -> Table:
    """One row a setting."""
    plain, with_rows = statistics.median(clock.plain), statistics.median(clock.task_gradients)
    places = {(event.seed, event.step) for event in events}
    seeds = {event.seed for event in events}
    table = Table(
        title=f"{len(places)} events of dominated conflict, 3 tasks, {len(seeds)} seeds",
        caption=(
            "Medians of drift (largest relative change of a task loss; held out: on 8 unseen batches) and of the cost;"
            " means of the rest. A plain step is a forward and a backward pass of the mean loss, here"
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
    events, clock = collect(settings(), arguments.seeds, arguments.events_per_seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(vars(events[0])))
        writer.writeheader()
        writer.writerows(vars(event) for event in events)
    console = Console(width=200)
    console.print(summarize(events, clock))
    if arguments.resnet_steps:
        for row in settings():
            if row.name.strip() in ("level set, LoRA 5, conflict (default)", "mean term", "deferred"):
                console.print(resnet_cost(row, arguments.resnet_steps))


if __name__ == "__main__":
    main()
