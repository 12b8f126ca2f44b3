"""Command line of the figures: `python -m recipes.figures conflict-ratio`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from recipes.common.command import add_run_options, at_least, exit_status, make_console, print_files
from recipes.figures.conflict_ratio import draw_conflict_ratio
from recipes.figures.loss_levels import draw_loss_levels
from recipes.figures.relaxed_trigger import draw_relaxed_trigger
from recipes.figures.request import Request
from recipes.methods import METHODS
from recipes.study.study import INTERRUPTED

__all__ = ["main"]

_WIDTH = 160


@dataclass(frozen=True)
class _Figure:
    title: str
    draw: Callable[[Request, Console], Iterator[tuple[str, Path]]]
    problems: Sequence[str]
    methods: Sequence[str]


_FIGURES = {
    "loss-levels": _Figure(
        "Fig. 3: conflict against loss, and teleports, for several methods",
        draw_loss_levels,
        ["digits:narrow"],
        ["LS", "MGDA", "PCGrad", "CAGrad", "Nash-MTL", "FairGrad"],
    ),
    "conflict-ratio": _Figure(
        "Fig. 5(a): share of conflicting steps with 2, 3, 11 and 40 tasks",
        draw_conflict_ratio,
        [
            "digits:narrow,look_every=4",
            "digits:balanced,look_every=4",
            "scenes:rooms,num_train=200,num_val=20,look_every=2",
            "qm9:small,epochs=3,look_every=8",
            "scenes:faces,num_train=2000,num_val=200,num_test=200,look_every=4",
        ],
        ["LS"],
    ),
    "relaxed-trigger": _Figure(
        "Fig. 10: Δm% and time as Eq. 4 asks for fewer tasks", draw_relaxed_trigger, ["digits:many"], ["FairGrad"]
    ),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run what a figure needs, draw it, and return the exit status."""
    options = _parse(args)
    figure = _FIGURES[options.figure]
    console = make_console(_WIDTH)

    def draw() -> None:
        request = Request(
            options.problems or figure.problems,
            options.methods or figure.methods,
            range(options.first_seed, options.first_seed + options.seeds),
            options.output,
            options.epochs,
            options.jobs,
        )
        request.output.mkdir(parents=True, exist_ok=True)
        print_files(console, list(figure.draw(request, console)))

    return exit_status(draw, console, INTERRUPTED)


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.figures",
        description="Draw a figure of the paper from runs of your own. Finished runs are kept and not run again.",
        epilog="figures:\n" + "\n".join(f"  {name:17}{figure.title}" for name, figure in _FIGURES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("figure", choices=_FIGURES, help="see below")
    add("--problems", nargs="+", metavar="RECIPE:PROBLEM", help="as in studies, such as digits:many,width=8")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="default: those of the figure")
    add("--first-seed", type=at_least(0), default=0, help="default: %(default)s")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add_run_options(parser, seeds=3, epochs="as the problems say", output="study_output", jobs=cores)
    return parser.parse_args(args)


if __name__ == "__main__":
    raise SystemExit(main())
