"""Command line of the recipe: `python -m recipes.toy` trains from every start and draws the trajectories."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from lightning_cost import ConflictAlignment, RandomDirection, Reversed, SymmetryTeleportCallback
from recipes.common.command import at_least, make_console, output_folder
from recipes.common.training import be_a_quiet_worker
from recipes.toy.figure import draw
from recipes.toy.model import ToyModel
from recipes.toy.problem import STARTS, TASKS, toy_losses
from recipes.toy.run import REACHED, Run, train

__all__ = ["main"]

_SHIFT = 0.1
_CAPTION = f"""\
LS is the mean of the losses. COST is the default callback, but with invariance="mean" (and start_epoch=0, since a run \
is one epoch): with the default, per_task, no direction is left, since the gradients of two tasks span the plane.
"paper" is SymmetryTeleportCallback.paper() at every 10th step, also with the mean. It checks no loss afterwards, so \
the mean loss may rise. Rise: the largest rise of the mean loss by one teleport.
All three starts are shown. From the second, LS does not get stuck, and teleports only delay it.
Gap: by how much both losses can still fall at once; 0 on the Pareto front. A run stops at a gap of {REACHED:g}.
The learning rate and the betas of Adam were chosen so that COST needs fewer than 1300 steps, while LS is still stuck; \
in 5000 steps it leaves the valleys by itself. Two parameters show how COST works, not how much it gains."""


def main(args: Sequence[str] | None = None) -> None:
    """Train from the three starts with each method, print a table and save the figure."""
    options = _parser().parse_args(args)
    be_a_quiet_worker()
    starts, seed = _starts(options.seed), options.seed or 0
    cost = partial(SymmetryTeleportCallback, start_epoch=0, seed=seed)
    paper = partial(
        SymmetryTeleportCallback.paper,
        start_epoch=0,
        max_per_epoch=None,
        check_every_n_steps=10,
        invariance="mean",
        seed=seed,
    )
    methods = {
        "LS": lambda: None,
        "+ COST": partial(cost, invariance="mean"),
        "+ COST, per_task": cost,
        "+ COST, paper": paper,
    }
    if options.controls:
        methods["+ COST, random"] = partial(cost, invariance="mean", objective=RandomDirection())
        methods["+ COST, reversed"] = partial(cost, invariance="mean", objective=Reversed(ConflictAlignment()))
    console = make_console(120)
    runs: dict[str, list[Run]] = {}
    with console.status("") as status:
        for method, make_callback in methods.items():
            for start in starts:
                status.update(f"{method} from ({start[0]:.3g}, {start[1]:.3g})")
                runs.setdefault(method, []).append(train(ToyModel(start), options.steps, make_callback()))
    console.print(_table(starts, runs))
    console.print(_CAPTION, highlight=False)
    options.output.mkdir(parents=True, exist_ok=True)
    image = options.output / "trajectories.png"
    draw(
        {"LS": runs["LS"], "LS with COST": runs["+ COST"], "LS with COST, paper's search": runs["+ COST, paper"]}, image
    )
    console.print(f"Figure: {image}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m recipes.toy", description="Trajectories on the problem of CAGrad.")
    parser.add_argument("--output", type=output_folder, default=Path("toy_output"), help="folder (%(default)s)")
    parser.add_argument("--steps", type=at_least(1), default=1300, help="most steps of a run (%(default)s)")
    parser.add_argument("--seed", type=int, help=f"shift each start at random by at most {_SHIFT}; default: no shift")
    parser.add_argument("--controls", action="store_true", help="also teleport in random and in reversed directions")
    return parser


def _starts(seed: int | None) -> list[tuple[float, float]]:
    if seed is None:
        return list(STARTS)
    generator = torch.Generator().manual_seed(seed)
    shifts = _SHIFT * (2 * torch.rand(len(STARTS), 2, generator=generator) - 1)
    return [(t1, t2) for t1, t2 in (torch.tensor(STARTS) + shifts).tolist()]


def _table(starts: Sequence[tuple[float, float]], runs: Mapping[str, Sequence[Run]]) -> Table:
    table = Table(title="Two parameters, two losses, three starts")
    for heading in ("start", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in (*TASKS, "gap", "steps", "teleports", "rise"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, (t1, t2) in enumerate(starts):
        for method, of_method in runs.items():
            run = of_method[index]
            table.add_row(
                f"({t1:.3g}, {t2:.3g})" if method == "LS" else "",
                f"[{'green' if run.reached else 'red'}]{method}",
                *(f"{loss:.2f}" for loss in toy_losses(run.points[-1].double()).tolist()),
                "[green]front" if run.reached else f"[red]{run.gaps[-1]:.2f}",
                str(run.steps),
                f"{len(run.jumps)}/{len(run.reports)}" if run.reports else "",
                f"{run.largest_rise:.2f}" if len(run.jumps) else "",
            )
        table.add_section()
    return table


if __name__ == "__main__":
    main()
