"""Independent runs in worker processes, which always end with the program."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

__all__ = ["RunFailedError", "run_all"]

Spec = TypeVar("Spec")
Result = TypeVar("Result")


class RunFailedError(RuntimeError):
    """A run failed. The message has its name and its traceback."""


def run_all(
    function: Callable[[Spec], Result], specs: Mapping[str, Spec], jobs: int, prepare: Callable[[], None]
) -> Iterator[tuple[str, Result]]:
    """Call a function for every specification, in fresh worker processes.

    If a run fails, on Ctrl-C, or if the iteration is stopped, all workers are killed and no other run starts.

    Args:
        function: A function that can be pickled, like its argument and its result.
        specs: Name of the run to its specification, in the order in which to start.
        jobs: Number of processes.
        prepare: Called in each process before its first run. It must be possible to pickle it.

    Yields:
        Name and result of each run, in the order in which they finish.

    Raises:
        ValueError: If `jobs` is below 1.
        RunFailedError: If a run raises an exception or its process dies.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1.")
    others = set(active_children())
    executor = ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (prepare,))
    left = list(specs)
    try:
        with _interrupts_ignored():
            futures = {executor.submit(_call, function, name, spec): name for name, spec in specs.items()}
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool as error:
                # Runs start in order, so the first ones without a result are the ones that were running.
                raise RunFailedError(
                    f"A worker process died without a traceback, as when memory runs out, in one of: {left[:jobs]}."
                ) from error
            left.remove(futures[future])
            yield futures[future], result
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for child in set(active_children()) - others:
            child.kill()
        raise
    executor.shutdown()


def _call(function: Callable[[Spec], Result], name: str, spec: Spec) -> Result:
    try:
        return function(spec)
    except Exception:
        # The message holds the cause as text, since some exceptions cannot be pickled.
        raise RunFailedError(f"The run {name!r} failed:\n{traceback.format_exc()}") from None


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Make the processes that start in this block ignore Ctrl-C. The terminal sends it to all, and the parent acts."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _start_worker(prepare: Callable[[], None]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
