"""Command line: `python -m recipes.tables cityscapes --data DIR` makes a table of the paper."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import yaml
from rich.console import Console

from recipes.common.command import add_run_options, at_least, exit_status, make_console, print_files
from recipes.tables.benchmarks import BENCHMARKS
from recipes.tables.runs import COSTS, METHOD_LAYERS, Run, result_of, train
from recipes.tables.table import rows_of, to_markdown, to_table, write_runs

__all__ = ["main"]

_CAPTION = """\
Δm% is relative to the published single-task values, ± one standard deviation over the seeds. MR is the mean rank \
among the rows of the same source. That of the paper is among all its methods, so the two are not comparable. "+ COST" \
has the settings of the paper, SymmetryTeleportCallback.paper() with a start after a quarter of the epochs."""


def main(args: Sequence[str] | None = None) -> int:
    """Train what is missing, and print the table."""
    options = _parser().parse_args(args)
    console = make_console(160)
    interrupted = "Interrupted. The same command goes on from the last checkpoints."
    return exit_status(partial(_make, options, console), console, interrupted)


def _make(options: argparse.Namespace, console: Console) -> None:
    benchmark = BENCHMARKS[options.benchmark]
    if benchmark.needs_data and options.data is None:
        raise ValueError(f"`--data` must name the folder of {options.benchmark}. Its README says what is in it.")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = [
        Run(
            benchmark=options.benchmark,
            method=method,
            cost=cost,
            seed=seed,
            output=options.output,
            data=options.data,
            epochs=options.epochs,
            settings=dict(map(_setting, options.set)),
        )
        for seed in seeds
        for method in dict.fromkeys(options.methods)
        for cost in dict.fromkeys(options.cost)
    ]
    results = _results(runs, options.jobs, console)
    by_label: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(results[run.name])
    rows = rows_of(benchmark, by_label)
    console.print(to_table(benchmark, rows, _CAPTION))
    markdown, per_run = (options.output / f"{options.benchmark}{ending}" for ending in (".md", "_runs.csv"))
    markdown.write_text(to_markdown(benchmark, rows, _CAPTION), encoding="utf-8")
    write_runs(per_run, [(run.label, run.seed, results[run.name]) for run in runs])
    print_files(console, [("the table", markdown), ("all metrics of each run", per_run)])


def _results(runs: Sequence[Run], jobs: int, console: Console) -> dict[str, dict[str, float]]:
    """The result of each run by its name. Those that are missing are trained."""
    found = {run.name: result_of(run) for run in runs}
    results = {name: result for name, result in found.items() if result is not None}
    missing = [run for run in runs if run.name not in results]
    devices: SimpleQueue[int | None] = SimpleQueue()
    for job in range(jobs):
        devices.put(job % torch.cuda.device_count() if torch.cuda.is_available() and jobs > 1 else None)

    def on_a_device(run: Run) -> dict[str, float]:
        device = devices.get()
        try:
            return train(run, device)
        finally:
            devices.put(device)

    executor = ThreadPoolExecutor(jobs)
    try:
        for run, result in zip(missing, executor.map(on_a_device, missing), strict=True):
            results[run.name] = result
            console.print(f"{len(results)} of {len(runs)} runs: {run.name}", highlight=False)
    finally:
        # The runs have got Ctrl-C as well. They finish their step, and write a checkpoint.
        executor.shutdown(cancel_futures=True)
    return results


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise ValueError(f"`--set` takes options of the recipe as `data.batch_size=4`; got {text!r}.")
    return key, yaml.safe_load(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m recipes.tables",
        description="Make a table of the COST paper: train what is missing, and print it beside the published rows.",
        epilog=f"methods: {', '.join(METHOD_LAYERS)}",
    )
    add = parser.add_argument
    add("benchmark", choices=BENCHMARKS, help="the benchmark")
    add("--data", type=Path, help="folder of the data; qm9 needs none")
    add("--methods", nargs="+", choices=METHOD_LAYERS, metavar="METHOD", default=["FairGrad"], help="default: FairGrad")
    add("--cost", nargs="+", choices=COSTS, default=["none", "paper"], help="with which COST; default: none paper")
    add("--first-seed", type=at_least(0), default=0, help="default: %(default)s")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of the recipe, such as data.batch_size=4")
    jobs = max(1, torch.cuda.device_count())
    add_run_options(parser, seeds=3, epochs="those of the paper", output="tables_output", jobs=jobs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
