"""What limits a teleport with many tasks: how far a linear prediction holds, and which task is the worst next.

A problem of the study is trained with the mean of the losses. At events of dominated conflict every setting teleports
from the same point, and then everything is put back. Beside that, the step of the default objective is followed at
several lengths, without an acceptance test: the cosine of the task that it is for is compared with its linear
prediction, and the other tasks are watched.

Run `python -m benchmarks.many --problem digits:many` or `--problem qm9:small`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.step import quiet
from benchmarks.teleport import Setting, conflict_share, largest_change, shared_of, surface_of
from lightning_cost import ConflictAlignment, LevelSetSearch, Point, Surface, Teleporter
from lightning_cost.invariance import LevelSet
from lightning_cost.triggers import dominated_conflict
from recipes.study.experimental import SoftMinimum
from recipes.study.problem import find_problem

LENGTHS = (0.25, 0.5, 1.0, 2.0)
# Short enough for a derivative, long enough for single precision.
_PROBE = 0.05
_HELD_OUT = 4


def settings() -> list[Setting]:
    """The default, several steps of it, and objectives that lift several tasks at once."""
    rows = [Setting("default", LevelSetSearch, ConflictAlignment)]
    for steps in (1, 2, 3, 4):
        plural = "s" * (steps > 1)
        search = partial(LevelSetSearch, full_rank=True, steps=steps, shrink=None)
        rows.append(Setting(f"full rank, {steps} step{plural}", search, ConflictAlignment))
        rows.append(
            Setting(f"full rank, {steps} step{plural}, mean term", search, partial(ConflictAlignment, terms="mean"))
        )
        rows.append(Setting(f"full rank, {steps} step{plural}, soft minimum", search, SoftMinimum))
    return rows


@dataclass
class Tried:
    """What one setting did at one event. `cost` counts backward passes in aggregator steps of K passes."""

    accepted: bool
    before: Tensor
    after: Tensor
    resolved: bool
    held_out_before: float
    held_out: float
    cost: float


@dataclass
class Followed:
    """The step of the default objective at one length, in units of what it aims at."""

    gain: float
    predicted: float
    smallest: float
    is_worst: bool
    drift: float
    drift_after_chord: float
    drifting: str


def events(
    name: str, seed: int, count: int, earliest: int, apart: int, change: Callable[[Any], None] = lambda model: None
) -> Iterator[tuple[Any, Surface, Point, Any]]:
    """Train with the mean of the losses, and stop at some conflicts. `change` changes the model beforehand."""
    model, data, lr = prepared(name, seed, change)
    held_out = [surface_of(model, batch) for _, batch in zip(range(_HELD_OUT), data.val_dataloader(), strict=False)]
    for step, surface, start in steps(model, data, lr):
        if step >= earliest and dominated_conflict(start.gradients):
            yield model, surface, start, held_out
            count, earliest = count - 1, step + apart
            if not count:
                return


def prepared(name: str, seed: int, change: Callable[[Any], None] = lambda model: None) -> tuple[Any, Any, float]:
    """The model, the data and the learning rate of a problem."""
    problem = find_problem(name)
    L.seed_everything(seed, verbose=False)
    model, data = problem.make_model(problem.tasks, None), problem.make_data(problem.tasks, seed)
    change(model)
    data.prepare_data()
    data.setup("fit")
    return model, data, getattr(problem, "lr", 1e-3)


def steps(model: Any, data: Any, lr: float) -> Iterator[tuple[int, Surface, Point]]:
    """Train with the mean of the losses, and stop before each step. Leave `.grad` as it is."""
    loader, optimizer, step = data.train_dataloader(), torch.optim.Adam(model.parameters(), lr=lr), 0
    for epoch in range(1000):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            surface = surface_of(model, batch)
            yield step, surface, surface.point()
            optimizer.step()
            step += 1


def try_setting(row: Setting, model: Any, surface: Surface, start: Point, held_out: list[Surface]) -> Tried:
    """Teleport, look, and put everything back."""
    origin, grads = surface.position(), surface.grads()
    held_out_before = conflict_share([other.point() for other in held_out])
    surface.set_grads(grads)
    outcome = Teleporter(row.objective(), row.search()).run(surface, {"shared": shared_of(model)}, start)
    end = outcome.end.gradients
    tried = Tried(
        accepted=outcome.accepted,
        before=start.gradients.cosines,
        after=end.cosines.clone(),
        resolved=not dominated_conflict(end),
        held_out_before=held_out_before,
        held_out=conflict_share([other.point() for other in held_out]),
        cost=outcome.backwards / len(end.names),
    )
    surface.go_back(origin, grads)
    return tried


def follow(surface: Surface, start: Point) -> dict[float, Followed]:
    """Take the step of the default objective at several lengths, each with its chord step, and put everything back."""
    origin, grads = surface.position(), surface.grads()
    objective = ConflictAlignment()
    value, gradient = objective.value_and_gradient(surface, start)
    level_set = LevelSet(start.gradients, "per_task")
    direction = level_set.tangent(gradient)
    reach = (objective.aim(value) - value) / float(direction.norm()) ** 2
    cosines, worst = start.gradients.cosines, int(start.gradients.cosines.argmin())

    def there(factor: float) -> tuple[Tensor, float, Point]:
        surface.move_to(origin)
        surface.move_by(direction, factor * reach)
        losses = surface.losses()
        surface.move_by(level_set.retraction(losses - start.losses))
        return losses, largest_change(losses, start.losses), surface.point()

    slopes = (there(_PROBE)[2].gradients.cosines - cosines) / _PROBE
    found = {0.0: Followed(0.0, 0.0, float(cosines[worst]), True, 0.0, 0.0, "")}
    for factor in LENGTHS:
        losses, change, end = there(factor)
        after = end.gradients.cosines
        found[factor] = Followed(
            gain=float(after[worst] - cosines[worst]),
            predicted=float(factor * slopes[worst]),
            smallest=float(after.min()),
            is_worst=int(after.argmin()) == worst,
            drift=change,
            drift_after_chord=largest_change(end.losses, start.losses),
            drifting=start.gradients.names[int(((losses - start.losses) / start.losses).abs().argmax())],
        )
    surface.go_back(origin, grads)
    return found


def table_of_settings(tried: dict[str, list[Tried]], title: str) -> Table:
    """One row a setting."""
    table = Table(
        title=title,
        caption="Cost: backward passes in aggregator steps of K passes, those of the new gradients included.",
    )
    for heading in ("setting", "accepted", "smallest cosine", "tasks in conflict", "resolved", "held out", "cost"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for name, rows in tried.items():
        before, after = (statistics.mean(float(getattr(row, at).min()) for row in rows) for at in ("before", "after"))
        many, few = (statistics.mean(int((getattr(row, at) < 0).sum()) for row in rows) for at in ("before", "after"))
        table.add_row(
            name,
            f"{statistics.mean(row.accepted for row in rows):.0%}",
            f"{before:.2f} -> {after:.2f}",
            f"{many:.1f} -> {few:.1f}",
            f"{statistics.mean(row.resolved for row in rows):.0%}",
            " -> ".join(
                f"{statistics.mean(getattr(r, at) for r in rows):.0%}" for at in ("held_out_before", "held_out")
            ),
            f"{statistics.mean(row.cost for row in rows):.1f}",
        )
    return table


def table_of_lengths(followed: list[dict[float, Followed]], title: str) -> Table:
    """One row a length."""
    table = Table(title=title, caption="Lengths in units of what the step aims at; medians, and shares of the events.")
    for heading in (
        "length",
        "gain of the task it is for",
        "linear prediction",
        "smallest cosine",
        "another is the worst",
        "drift",
        "after the chord step",
        "over 2 %",
        "drifts most",
    ):
        table.add_column(heading, justify="right")
    for length in followed[0]:
        rows = [event[length] for event in followed]
        names = [row.drifting for row in rows]
        most = max(names, key=names.count)
        table.add_row(
            f"{length:g}",
            *(f"{statistics.median(getattr(row, name) for row in rows):+.2f}" for name in ("gain", "predicted")),
            f"{statistics.median(row.smallest for row in rows):.2f}",
            f"{statistics.mean(not row.is_worst for row in rows):.0%}",
            *(
                f"{statistics.median(getattr(row, name) for row in rows):.2%}"
                for name in ("drift", "drift_after_chord")
            ),
            f"{statistics.mean(not row.drift_after_chord <= 0.02 for row in rows):.0%}",
            f"{most} ({names.count(most) / len(names):.0%})",
        )
    return table


def main() -> None:
    """Parse arguments, try and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", default="digits:many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[800, 801, 802, 803])
    parser.add_argument("--events-per-seed", type=int, default=10)
    parser.add_argument("--earliest", type=int, default=60, help="step of the first event")
    parser.add_argument("--apart", type=int, default=40, help="least number of steps between two events")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet(arguments.threads)
    tried: dict[str, list[Tried]] = {row.name: [] for row in settings()}
    followed = []
    for seed in arguments.seeds:
        found = events(arguments.problem, seed, arguments.events_per_seed, arguments.earliest, arguments.apart)
        for model, surface, start, held_out in found:
            for row in settings():
                tried[row.name].append(try_setting(row, model, surface, start, held_out))
            followed.append(follow(surface, start))
    console = Console(width=160)
    num_tasks = len(find_problem(arguments.problem).tasks)
    title = f"{arguments.problem}, {num_tasks} tasks, {len(followed)} events of {len(arguments.seeds)} seeds"
    console.print(table_of_settings(tried, title))
    console.print(table_of_lengths(followed, f"The step of the default objective; {title}"))


if __name__ == "__main__":
    main()
