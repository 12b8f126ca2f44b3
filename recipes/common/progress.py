"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recipes.common.parallel import Result, Spec, run_all

__all__ = ["make_progress", "run_with_progress"]


def make_progress(console: Console) -> Progress:
    """A progress bar with a description, a count, and the elapsed and the remaining time."""
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
    """Call `run_all` under a progress bar, which shows `title` and then the name of the run that finished last."""
    with make_progress(console) as progress:
        task = progress.add_task(title, total=len(specs))
        for name, result in run_all(function, specs, jobs, prepare):
            progress.update(task, advance=1, description=name)
            yield name, result
