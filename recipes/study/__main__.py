"""Command line of studies: `python -m recipes.study digits --preset plug-and-play`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import get_args

from rich.markdown import Markdown

from recipes.common.command import add_run_options, at_least, exit_status, make_console, print_files
from recipes.methods import METHODS
from recipes.study.callbacks import CALLBACKS
from recipes.study.presets import PRESETS, Preset
from recipes.study.spec import file_stem
from recipes.study.statistics import Split
from recipes.study.study import INTERRUPTED, Study

__all__ = ["main"]

_WIDTH = 160


def main(args: Sequence[str] | None = None) -> int:
    """Run a study, write its tables and figures, and return the exit status."""
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
    preset = PRESETS.get(options.preset) or Preset(
        "Methods and callbacks", options.methods or ["LS"], options.callbacks or ["COST"]
    )
    for option, wanted, known in (
        ("--methods", options.methods, preset.methods),
        ("--callbacks", options.callbacks, preset.callbacks),
    ):
        if not set(wanted or ()) <= set(known):
            raise ValueError(f"`{option}` must be of the preset's {sorted(known)}; got {wanted}.")
    name = ",".join([f"{options.recipe}:{options.problem or preset.problem}", *options.set])
    rows = [
        row
        for row in preset.rows(name)
        if row.variant.method in (options.methods or preset.methods)
        and row.variant.callback in ("", *(options.callbacks or preset.callbacks))
    ]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    stem = file_stem(f"{name}_{options.preset or 'grid'}")
    return Study(rows, options.output, seeds, options.epochs, preset.title), stem


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    presets = "\n".join(f"  {name:16}{preset.title}" for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="python -m recipes.study",
        description="Compare multi-task methods with and without teleportation: same seeds, same batches.",
        epilog=f"presets:\n{presets}\n\nmethods: {', '.join(METHODS)}\n\ncallbacks: {', '.join(CALLBACKS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("recipe", help="a recipe with a module `problems`, such as digits, or a module of yours")
    add("--preset", choices=PRESETS, metavar="NAME", help="a preset, see below; default: compare methods and callbacks")
    add("--problem", help="problem of the recipe; default: the preset's")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change fields of the problem, such as width=8")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="default: all of the preset; without one, LS")
    add(
        "--callbacks",
        nargs="+",
        metavar="CALLBACK",
        help="names, or module:function; default: all of the preset; without one, COST",
    )
    add("--first-seed", type=at_least(0), default=0, help="default: %(default)s")
    add(
        "--split",
        choices=get_args(Split),
        default="validation",
        help="which metrics to compare; choose settings on validation, and look at test once",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add_run_options(parser, seeds=5, epochs="as the problem says", output="study_output", jobs=cores)
    return parser.parse_args(args)


if __name__ == "__main__":
    raise SystemExit(main())
