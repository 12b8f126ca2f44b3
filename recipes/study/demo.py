"""What `make` shows of a recipe: a small study, its tables and figures, from one command."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from recipes.common.command import at_least, exit_status, make_console, print_files
from recipes.common.compare import Variant
from recipes.study.problem import find_problem
from recipes.study.spec import Row
from recipes.study.study import INTERRUPTED, Study

__all__ = ["Demo"]

_WIDTH = 160


@dataclass(frozen=True)
class Demo:
    """A command that trains methods with and without COST and reports the test metrics.

    Whatever interrupts it, the same command goes on with the runs that are not finished.

    Attributes:
        module: What is behind `python -m`.
        description: What it trains.
        recipe: Name of the recipe; the output goes to `<recipe>_output` unless told otherwise.
        problem: The problem.
        quick: One that tells within seconds whether anything runs, and what it is.
        methods: The methods.
        conclude: What to do with the finished study: print more, and return what was written.
    """

    module: str
    description: str
    recipe: str
    problem: str
    quick: tuple[str, str]
    methods: tuple[str, ...]
    conclude: Callable[[Study, Console], Iterable[tuple[str, Path]]]

    def run(self, args: Sequence[str] | None = None) -> int:
        """Train, compare and draw.

        Args:
            args: Command line without the program's name; None: `sys.argv`.

        Returns:
            The exit status.
        """
        options = self._parse(args)
        console = make_console(_WIDTH)
        return exit_status(lambda: self._compare(options, console), console, INTERRUPTED)

    def _compare(self, options: argparse.Namespace, console: Console) -> None:
        began = time.perf_counter()
        problem = self.quick[0] if options.quick else self.problem
        rows = [Row(problem, Variant(method, callback)) for method in self.methods for callback in ("", "COST")]
        study = Study(rows, options.output, range(options.seeds), options.epochs, f"{self.description}: test metrics")
        study.run(options.jobs, console)
        results = study.results("test")
        written = list(results.write(options.output, self.recipe))
        console.print(Markdown(results.markdown()))
        written += self.conclude(study, console)
        print_files(console, written)
        console.print(f"\nDone in {time.perf_counter() - began:.0f} s.", highlight=False)

    def _parse(self, args: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}", description=f"{self.description}.")
        epochs, output = find_problem(self.problem).epochs, Path(f"{self.recipe}_output")
        parser.add_argument("--epochs", type=at_least(1), help=f"default: {epochs}")
        parser.add_argument("--seeds", type=at_least(1), default=1, help="number of seeds; default: 1")
        parser.add_argument("--output", type=Path, default=output, help=f"folder; default: {output}")
        parser.add_argument(
            "--jobs", type=at_least(1), default=min(2, os.cpu_count() or 1), help="runs at a time; default: 2"
        )
        parser.add_argument("--quick", action="store_true", help=f"{self.quick[1]}: does it run at all?")
        return parser.parse_args(args)
