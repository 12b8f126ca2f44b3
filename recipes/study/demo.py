"""The demos of the recipes: a small study, with its tables and figures, in one command."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from recipes.common.command import add_run_options, exit_status, make_console, print_files
from recipes.study.presets import Preset
from recipes.study.problem import find_problem
from recipes.study.study import INTERRUPTED, Study

__all__ = ["Demo"]

_WIDTH = 160


@dataclass(frozen=True)
class Demo:
    """A command that trains methods with and without COST and reports the test metrics.

    If it is interrupted, the same command goes on with the unfinished runs.

    Attributes:
        module: Module to run with `python -m`.
        description: What it trains.
        name: Beginning of the file names; the default folder is `<name>_output`.
        problems: Names of the problems, each with the name of a small one for `--quick`.
        quick: What `--quick` does.
        methods: Names of the methods.
        conclude: Prints more about the finished study, and yields what else was written.
        seeds: Default number of seeds.
    """

    module: str
    description: str
    name: str
    problems: Mapping[str, str]
    quick: str
    methods: Sequence[str]
    conclude: Callable[[Study, Console], Iterable[tuple[str, Path]]]
    seeds: int = 1

    def run(self, args: Sequence[str] | None = None) -> int:
        """Train, compare and draw, and return the exit status."""
        options = self._parse(args)
        console = make_console(_WIDTH)
        return exit_status(lambda: self._compare(options, console), console, INTERRUPTED)

    def _compare(self, options: argparse.Namespace, console: Console) -> None:
        began = time.perf_counter()
        problems = self.problems.values() if options.quick else self.problems
        preset = Preset(f"{self.description}: test metrics", self.methods, ["COST"])
        rows = [row for problem in problems for row in preset.rows(problem)]
        seeds = range(1 if options.quick else options.seeds)
        study = Study(rows, options.output, seeds, options.epochs, preset.title)
        study.run(options.jobs, console)
        results = study.results("test")
        written = list(results.write(options.output, self.name))
        console.print(Markdown(results.markdown()))
        written += self.conclude(study, console)
        print_files(console, written)
        console.print(f"\nDone in {time.perf_counter() - began:.0f} s.", highlight=False)

    def _parse(self, args: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}", description=f"{self.description}.")
        epochs = " and ".join(str(find_problem(name).epochs) for name in self.problems)
        jobs, output = min(2, os.cpu_count() or 1), f"{self.name}_output"
        add_run_options(parser, seeds=self.seeds, epochs=epochs, output=output, jobs=jobs)
        parser.add_argument("--quick", action="store_true", help=f"check that it runs: one seed, {self.quick}")
        return parser.parse_args(args)
