"""QM9 from nothing: `make qm9`, or `python -m recipes.qm9.demo`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.markdown import Markdown

from recipes.common.command import at_least, make_console, print_error
from recipes.common.compare import Variant
from recipes.common.parallel import RunFailedError
from recipes.qm9.problems import PROBLEMS
from recipes.study import Row, Study
from recipes.study.store import StoredRunError

__all__ = ["main"]

_WIDTH = 160
_METHODS = ("LS", "FairGrad")
_FULL = "qm9:small"
_QUICK = f"{_FULL},tasks=[mu, homo],num_molecules=180,num_val=30,num_test=30,look_every=1"


def main(args: Sequence[str] | None = None) -> int:
    """Build the cache, compare methods with and without COST, and draw what they predict.

    Whatever interrupts it, the same command goes on with the runs that are not finished.

    Args:
        args: Command line without the program's name; None: `sys.argv`.

    Returns:
        The exit status.
    """
    options = _parse(args)
    console = make_console(_WIDTH)
    began = time.perf_counter()
    problem = _QUICK if options.quick else _FULL
    rows = [Row(problem, Variant(method, callback)) for method in _METHODS for callback in ("", "COST")]
    study = Study(rows, options.output, range(options.seeds), options.epochs, "QM9 with and without COST")
    try:
        study.run(options.jobs, console)
        results = study.results("test")
        written = list(results.write(options.output, "qm9"))
    except (RunFailedError, StoredRunError, ImportError, OSError, ValueError) as error:
        print_error(console, error)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted. What is finished is kept: the same command goes on with the rest.")
        return 130
    console.print(Markdown(results.markdown()))
    written += [
        (f"predicted against true values: {spec.variant}", study.folder(spec) / "parity.png")
        for spec in study.specs
        if spec.task is None and spec.seed == 0
    ]
    for what, path in written:
        console.print(f"{path}  {what}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nDone in {time.perf_counter() - began:.0f} s.", highlight=False)
    return 0


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.qm9.demo",
        description=f"Train {' and '.join(_METHODS)} with and without COST on 10,000 molecules of QM9.",
    )
    parser.add_argument("--epochs", type=at_least(1), help=f"default: {PROBLEMS['small'].epochs}")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="number of seeds; default: 1")
    parser.add_argument("--output", type=Path, default=Path("qm9_output"), help="folder; default: qm9_output")
    parser.add_argument(
        "--jobs", type=at_least(1), default=min(2, os.cpu_count() or 1), help="runs at a time; default: 2"
    )
    parser.add_argument("--quick", action="store_true", help="2 targets, 180 molecules: does it run at all?")
    return parser.parse_args(args)


if __name__ == "__main__":
    raise SystemExit(main())
