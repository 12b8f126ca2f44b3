"""Other ways to teleport beside ours, on the same events of conflict: earlier ones on MLPs, and the null space.

On networks with piecewise linear activations, rescaling of hidden units keeps all outputs exactly. On MLPs with
bijective ones, a group action keeps those on the batch. Projection onto the null space of each layer's inputs does so
on any network, as far as there is such a space. All of them ascend the objective of ours.

Run `python -m benchmarks.peers`, or `--problems mlp-relu --events-per-seed 2 --seeds 1` for a quick look.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.many import events
from benchmarks.step import quiet
from benchmarks.teleport import MEAN_TERM, conflict_share, largest_change, mean_losses, shared_of
from lightning_cost import (
    ConflictAlignment,
    GradientNorm,
    LevelSetSearch,
    Objective,
    Point,
    Search,
    Surface,
    Teleporter,
)
from lightning_cost.searches import SearchContext
from lightning_cost.triggers import dominated_conflict
from recipes.peers import GroupActionSearch, NullSpaceSearch, RescalingSearch, free_shares
from recipes.peers.problems import as_mlp
from recipes.qm9.reach import ENDS, NO_RECURRENT_CELLS


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    search: Callable[[], Search]
    objective: Callable[[], Objective] = ConflictAlignment


OURS = (
    Setting("level set, LoRA 5 (default)", LevelSetSearch),
    Setting("level set, full rank", lambda: LevelSetSearch(full_rank=True)),
)
NULL_SPACE = (
    Setting("null space", NullSpaceSearch),
    Setting("null space, singular values up to 1 %", lambda: NullSpaceSearch(cutoff=1e-2)),
    Setting("null space, singular values up to 1 %, mean term", lambda: NullSpaceSearch(cutoff=1e-2), MEAN_TERM),
)
RESCALING = (
    Setting("rescaling, random", RescalingSearch),
    Setting("rescaling, along the gradient", lambda: RescalingSearch("gradient")),
    Setting("rescaling, along the gradient, spread 1", lambda: RescalingSearch("gradient", spread=1.0)),
    Setting("rescaling, along the gradient, gradient norm", lambda: RescalingSearch("gradient"), GradientNorm),
)
GROUP_ACTION = (
    Setting("group action", GroupActionSearch),
    Setting("group action, gradient norm", GroupActionSearch, GradientNorm),
)

# lin0 and lin1 of the public networks, and all but the recurrent cells, which are no Linear layers there.
REACH = (
    *OURS,
    Setting(
        "LoRA 5, no recurrent cells",
        lambda: LevelSetSearch(target_modules=NO_RECURRENT_CELLS),
    ),
    Setting("LoRA 5, embedding and output only", lambda: LevelSetSearch(target_modules=ENDS)),
)


@dataclass(frozen=True)
class Case:
    """A problem and the settings that can run on it."""

    problem: str
    settings: tuple[Setting, ...]
    change: Callable[[Any], None] = lambda model: None
    earliest: int = 60


CASES = {
    "mlp-leaky": Case(
        "digits:balanced",
        (*OURS, *RESCALING, *GROUP_ACTION, *NULL_SPACE),
        partial(as_mlp, hidden=128, activation="leaky_relu"),
    ),
    "mlp-relu": Case(
        "digits:balanced", (*OURS, *RESCALING, *NULL_SPACE), partial(as_mlp, hidden=128, activation="relu")
    ),
    "narrow": Case("digits:narrow", (*OURS, *RESCALING, *NULL_SPACE)),
    "many": Case("digits:many", (*OURS, *RESCALING, *NULL_SPACE)),
    "qm9": Case("qm9:small", (*OURS, *NULL_SPACE), earliest=20),
    "qm9-reach": Case("qm9:small", REACH, earliest=20),
}


@dataclass
class Tried:
    """What one setting did at one event."""

    accepted: bool
    drift: float
    drift_held_out: float
    before: float
    after: float
    resolved: bool
    held_out_before: float
    held_out: float
    price: float


def try_setting(
    row: Setting, model: Any, surface: Surface, start: Point, held_out: list[Surface], plain: float
) -> Tried:
    """Teleport twice, time the second, look, and put everything back."""
    origin, grads = surface.position(), surface.grads()
    before = [other.point() for other in held_out]
    teleporter = Teleporter(row.objective(), row.search())
    for _ in range(2):
        surface.go_back(origin, grads)
        surface.generator.manual_seed(0)
        began = time.perf_counter()
        outcome = teleporter.run(surface, {"shared": shared_of(model)}, start)
        seconds = time.perf_counter() - began
    end = outcome.end
    after = [other.point() for other in held_out]
    tried = Tried(
        accepted=outcome.accepted,
        drift=largest_change(end.losses, start.losses),
        drift_held_out=largest_change(mean_losses(after), mean_losses(before)),
        before=float(start.gradients.cosines.min()),
        after=float(end.gradients.cosines.min()),
        resolved=not dominated_conflict(end.gradients),
        held_out_before=conflict_share(before),
        held_out=conflict_share(after),
        price=seconds / plain,
    )
    surface.go_back(origin, grads)
    return tried


def plain_seconds(surface: Surface, repetitions: int = 7) -> float:
    """The median time of a forward and a backward pass of the mean loss."""
    origin, grads, times = surface.position(), surface.grads(), []
    weights = surface.losses().new_ones(len(surface.losses()))
    for _ in range(repetitions):
        began = time.perf_counter()
        surface.gradient(weights)
        times.append(time.perf_counter() - began)
    surface.go_back(origin, grads)
    return statistics.median(times)


def shares_of(model: Any, surface: Surface, start: Point) -> dict[float, dict[str, float]]:
    """By cutoff and layer, the share of the weights that the null space leaves free."""
    context = SearchContext(
        surface,
        start,
        surface.position(),
        ConflictAlignment(),
        "per_task",
        {"shared": shared_of(model)},
        1e-3,
        lambda *args, **kwargs: None,
    )
    return {cutoff: free_shares(context, cutoff) for cutoff in (1e-5, 1e-2)}


def table_of(title: str, tried: dict[str, list[Tried]]) -> Table:
    """One row a setting."""
    table = Table(title=title)
    for heading in ("search", "accepted", "drift batch / held out", "smallest cosine", "resolved", "held-out conflict"):
        table.add_column(heading, justify="left" if heading == "search" else "right")
    table.add_column("plain steps", justify="right")
    for name, rows in tried.items():
        drifts = [statistics.median(getattr(row, kind) for row in rows) for kind in ("drift", "drift_held_out")]
        mean = {
            key: statistics.mean(float(getattr(row, key)) for row in rows)
            for key in ("accepted", "before", "after", "resolved", "held_out_before", "held_out")
        }
        table.add_row(
            name,
            f"{mean['accepted']:.0%}",
            f"{drifts[0]:.1e} / {drifts[1]:.1e}",
            f"{mean['before']:.2f} -> {mean['after']:.2f}",
            f"{mean['resolved']:.0%}",
            f"{mean['held_out_before']:.2f} -> {mean['held_out']:.2f}",
            f"{statistics.median(row.price for row in rows):.1f}",
        )
    return table


def main() -> None:
    """Parse arguments, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=CASES, default=["mlp-leaky", "mlp-relu", "narrow", "many"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--events-per-seed", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet(arguments.threads)
    console = Console(width=160)
    for name in arguments.problems:
        case = CASES[name]
        tried: dict[str, list[Tried]] = {row.name: [] for row in case.settings}
        count = 0
        for seed in range(arguments.seeds):
            found = events(case.problem, seed, arguments.events_per_seed, case.earliest, 40, case.change)
            for model, surface, start, held_out in found:
                if not count and set(NULL_SPACE) <= set(case.settings):
                    for cutoff, shares in shares_of(model, surface, start).items():
                        listed = ", ".join(f"{layer} {share:.0%}" for layer, share in shares.items())
                        console.print(f"{name}: left free by singular values below {cutoff:g}: {listed}")
                count += 1
                plain = plain_seconds(surface)
                for row in case.settings:
                    tried[row.name].append(try_setting(row, model, surface, start, held_out, plain))
        console.print(table_of(f"{name}: {count} events of dominated conflict, {arguments.seeds} seeds", tried))


if __name__ == "__main__":
    main()
