"""Progress bars, and runs in worker processes under one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recipes.common.parallel import run_all

__all__ = ["make_progress", "run_with_progress"]

Spec = TypeVar("Spec")
Result = TypeVar("Result")


def make_progress(console: Console) -> Progress:
    """What is under way, how much of it is done, and the time that it took and will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def run_with_progress(
    function: Callable[[Spec], Result],
    specs: Mapping[str, Spec],
    jobs: int,
    prepare: Callable[[], None],
    console: Console,
    title: str,
) -> Iterator[tuple[str, Result]]:
    """Like `run_all`, and shows how many runs are done.

    Args:
        function: See `run_all`, as all that is not mentioned here.
        specs: See there.
        jobs: See there.
        prepare: See there.
        console: Where to show it.
        title: What is shown until the first run is done.
    """
    with make_progress(console) as progress:
        task = progress.add_task(title, total=len(specs))
        for name, result in run_all(function, specs, jobs, prepare):
            progress.update(task, advance=1, description=name)
            yield name, result
