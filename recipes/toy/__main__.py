"""Command line of the recipe: `python -m recipes.toy` trains from every start and draws the trajectories."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lightning_cost import ConflictAlignment, RandomDirection, Reversed, SymmetryTeleportCallback
from recipes.toy.figure import draw
from recipes.toy.model import ToyModel
from recipes.toy.problem import STARTS, TASKS, toy_losses
from recipes.toy.run import REACHED, Run, train

__all__ = ["main"]

PLAIN, COST, PER_TASK = "LS", "+ COST", "+ COST, per_task"
SHIFT = 0.1
"""How far a seed shifts a start at most, in each direction."""

CAPTION = f"""\
LS is the mean of the losses. COST is the default callback, but with invariance="mean" (and start_epoch=0, since a run \
is one epoch): with the default, per_task, no direction is left, since the gradients of two tasks span the plane.
All three starts are shown. From the second LS is not stuck, and teleports only delay it.
Gap: by how much both losses can still fall at once; 0 on the Pareto front. A run stops at a gap of {REACHED:g}.
Learning rate and memory of Adam were chosen so that 1300 steps are enough for COST, while LS is still stuck; in 5000 \
steps it leaves the valleys without help. Two parameters show how COST works, not how much it gains."""


def main(args: Sequence[str] | None = None) -> None:
    """Train from the three starts with each method, print a table and save the figure.

    Args:
        args: Command line without the program's name; None: `sys.argv`.
    """
    options = _parser().parse_args(args)
    # Threads gain nothing on tensors of two elements.
    torch.set_num_threads(1)
    starts, seed = _starts(options.seed), options.seed or 0
    cost = partial(SymmetryTeleportCallback, start_epoch=0, seed=seed)
    methods = {PLAIN: None, COST: partial(cost, invariance="mean"), PER_TASK: cost}
    if options.controls:
        methods["+ COST, random"] = partial(cost, invariance="mean", objective=RandomDirection())
        methods["+ COST, reversed"] = partial(cost, invariance="mean", objective=Reversed(ConflictAlignment()))
    console = Console()
    runs: dict[str, list[Run]] = {}
    with console.status("") as status:
        for method, teleport in methods.items():
            for start in starts:
                status.update(f"{method} from ({start[0]:.3g}, {start[1]:.3g})")
                run = train(ToyModel(start), options.steps, None if teleport is None else teleport())
                runs.setdefault(method, []).append(run)
    console.print(_table(starts, runs))
    console.print(CAPTION, highlight=False)
    options.output.mkdir(parents=True, exist_ok=True)
    image = options.output / "trajectories.png"
    draw({"LS": runs[PLAIN], "LS with COST": runs[COST]}, image)
    console.print(f"Figure: {image}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m recipes.toy", description="Trajectories on the problem of CAGrad.")
    parser.add_argument("--output", type=Path, default=Path("toy_output"), help="folder of the figure (%(default)s)")
    parser.add_argument("--steps", type=_positive, default=1300, help="most optimizer steps of a run (%(default)s)")
    parser.add_argument("--seed", type=int, help=f"shift the starts at random, by {SHIFT} at most (left out: do not)")
    parser.add_argument("--controls", action="store_true", help="also teleport in random and in reversed directions")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _starts(seed: int | None) -> list[tuple[float, float]]:
    if seed is None:
        return list(STARTS)
    generator = torch.Generator().manual_seed(seed)
    shifts = SHIFT * (2 * torch.rand(len(STARTS), 2, generator=generator) - 1)
    return [(t1, t2) for t1, t2 in (torch.tensor(STARTS) + shifts).tolist()]


def _table(starts: Sequence[tuple[float, float]], runs: Mapping[str, Sequence[Run]]) -> Table:
    table = Table(title="Two parameters, two losses, three starts")
    for heading in ("start", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in (*TASKS, "gap", "steps", "teleports"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, (t1, t2) in enumerate(starts):
        for method, ways in runs.items():
            run = ways[index]
            losses = toy_losses(run.points[-1].double()).tolist()
            table.add_row(
                f"({t1:.3g}, {t2:.3g})" if method == PLAIN else "",
                f"[{'green' if run.reached else 'red'}]{method}",
                *(f"{loss:.2f}" for loss in losses),
                "[green]front" if run.reached else f"[red]{run.gaps[-1]:.2f}",
                str(run.steps),
                f"{len(run.jumps)}/{len(run.reports)}" if run.reports else "",
                end_section=ways is list(runs.values())[-1],
            )
    return table


if __name__ == "__main__":
    main()
