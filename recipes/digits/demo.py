"""Multi-task training with and without COST on real digits: `make demo`, or `python -m recipes.digits.demo`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from recipes.common.command import at_least, exit_status, make_console, print_files
from recipes.common.compare import Run, compare
from recipes.common.progress import run_with_progress
from recipes.common.training import be_a_quiet_worker
from recipes.digits._figures import draw
from recipes.digits._files import write_files
from recipes.digits._runs import PROBLEMS, RunSpec, plan, plan_traces, train
from recipes.digits._table import make_caption, make_table, make_title

__all__ = ["main"]

_WIDTH, _TABLE_WIDTH = 100, 96
_FULL, _QUICK = 4000, 1280


def main(args: Sequence[str] | None = None) -> int:
    """Train, compare, and write tables and figures.

    Args:
        args: Command line without the program's name; None: `sys.argv`.

    Returns:
        The exit status.
    """
    options = _parse(args)
    console = make_console(_WIDTH)
    interrupted = "Interrupted; the workers have been ended and nothing was written."
    return exit_status(lambda: _compare(options, console), console, interrupted)


def _compare(options: argparse.Namespace, console: Console) -> None:
    began = time.perf_counter()
    num_train = _QUICK if options.quick else _FULL
    specs = plan(options.seeds, options.epochs, num_train) + plan_traces(options.seeds[0], num_train)
    options.output.mkdir(parents=True, exist_ok=True)
    runs = _train_all(specs, options.jobs, console)
    compared = {spec: run for spec, run in runs.items() if spec.teleport == "default"}
    summaries = {}
    # A narrow terminal wraps the lines of a table, where rich would cut its cells.
    wide = Console(width=max(console.width, _TABLE_WIDTH))
    console.print()
    console.rule("Multi-task training with and without COST")
    for name, problem in PROBLEMS.items():
        of_problem = [run for spec, run in compared.items() if spec.problem == name]
        summaries[name] = compare(of_problem, problem.higher_is_better)
        console.print(make_title(name, of_problem[0].measured.steps), highlight=False)
        wide.print(make_table(name, of_problem, summaries[name]), highlight=False)
    console.print(make_caption(options.seeds, options.jobs), highlight=False)
    console.print()
    written = [*write_files(runs, summaries, options.output), *draw(runs, options.output)]
    print_files(console, [(what, path or "(no teleport to draw)") for what, path in written])
    console.print(f"\nDone in {time.perf_counter() - began:.0f} s.", highlight=False)


def _train_all(specs: Sequence[RunSpec], jobs: int, console: Console) -> dict[RunSpec, Run]:
    """All runs, in the order of the specifications."""
    # The longer ones first, so that no worker is left with a long one at the end.
    started = sorted(specs, key=lambda spec: (not spec.variant.callback, spec.task is not None))
    by_name = {spec.name: spec for spec in started}
    title = f"training, {jobs} at a time"
    done = dict(run_with_progress(train, by_name, jobs, be_a_quiet_worker, console, title))
    return {spec: done[spec.name] for spec in specs}


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.digits.demo",
        description="Train two problems with and without COST; print tables, write CSV files and figures.",
    )
    defaults = ", ".join(f"{problem.epochs} ({name})" for name, problem in PROBLEMS.items())
    parser.add_argument(
        "--epochs", type=at_least(1), help=f"epochs of 62 steps, for both problems; default: {defaults}"
    )
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder; default: demo_output")
    parser.add_argument(
        "--jobs", type=at_least(1), default=min(2, os.cpu_count() or 1), help="runs at a time; default: 2"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, 2 epochs, fewer images: does it run at all?")
    options = parser.parse_args(args)
    if len(set(options.seeds)) != len(options.seeds):
        parser.error(f"argument --seeds: each seed once; got {options.seeds}")
    if options.quick:
        options.seeds, options.epochs = options.seeds[:1], 2
    return options


if __name__ == "__main__":
    raise SystemExit(main())
