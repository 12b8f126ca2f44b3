"""Command line of studies: `python -m recipes.study digits --preset plug-and-play`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.markdown import Markdown

from recipes.common.command import at_least, exit_status, make_console, print_files
from recipes.methods import METHODS
from recipes.study.callbacks import CALLBACKS
from recipes.study.presets import PRESETS, Preset, grid
from recipes.study.statistics import Split
from recipes.study.study import INTERRUPTED, Study

__all__ = ["main"]

_WIDTH = 160


def main(args: Sequence[str] | None = None) -> int:
    """Run a study and write its tables and figures.

    Args:
        args: Command line without the program's name; None: `sys.argv`.

    Returns:
        The exit status.
    """
    options = _parse(args)
    console = make_console(_WIDTH)

    def compare() -> None:
        study, stem = _study(options)
        done = study.run(options.jobs, console)
        console.print(f"{len(study.specs)} runs, {done} of them done now.", highlight=False)
        results = study.results(options.split)
        written = list(results.write(options.output, stem))
        console.print(Markdown(results.markdown()))
        print_files(console, written)

    return exit_status(compare, console, INTERRUPTED)


def _study(options: argparse.Namespace) -> tuple[Study, str]:
    chosen = grid(options.methods or ["LS"], options.callbacks or ["COST"])
    preset = PRESETS[options.preset] if options.preset else Preset("Methods and callbacks", chosen)
    name = ",".join([f"{options.recipe}:{options.problem or preset.problem}", *options.set])
    rows = preset.rows(name)
    for option, wanted, known in (
        ("--methods", options.methods or [], {row.variant.method for row in rows}),
        ("--callbacks", options.callbacks or [], {row.variant.callback for row in rows} - {""}),
    ):
        if not set(wanted) <= known:
            raise ValueError(f"`{option}` must be of the preset's {sorted(known)}; got {wanted}.")
    rows = [
        row
        for row in rows
        if (options.methods is None or row.variant.method in options.methods)
        and (options.callbacks is None or row.variant.callback in ("", *options.callbacks))
    ]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    stem = re.sub(r"[^A-Za-z0-9.=+-]+", "_", f"{name}_{options.preset or 'grid'}")
    return Study(rows, options.output, seeds, options.epochs, preset.title), stem


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    presets = "\n".join(f"  {name:16}{preset.title}" for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="python -m recipes.study",
        description="Compare multi-task methods with and without teleportation: same seeds, same batches.",
        epilog=f"presets:\n{presets}\n\nmethods: {', '.join(METHODS)}\n\ncallbacks: {', '.join(CALLBACKS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a recipe with a `problems` module, such as digits; or a module of yours")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help="which question to ask (below); default: the methods and callbacks given",
    )
    parser.add_argument("--problem", help="problem of the recipe; default: the preset's")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the problem, such as width=8"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help="only these methods; without a preset, default: LS",
    )
    parser.add_argument(
        "--callbacks",
        nargs="+",
        metavar="CALLBACK",
        help="only these callbacks, or module:function; without a preset, default: COST",
    )
    parser.add_argument("--seeds", type=at_least(1), default=5, help="number of seeds; default: 5")
    parser.add_argument("--first-seed", type=at_least(0), default=0, help="default: 0")
    parser.add_argument("--epochs", type=at_least(1), help="how long to train; default: as the problem says")
    parser.add_argument(
        "--split",
        choices=get_args(Split),
        default="validation",
        help="which metrics to compare; choose on validation, and look at test once",
    )
    parser.add_argument("--output", type=Path, default=Path("study_output"), help="folder; default: study_output")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=at_least(1), default=cores, help=f"runs at a time; default: {cores}, the cores")
    return parser.parse_args(args)


if __name__ == "__main__":
    raise SystemExit(main())
