"""Doing the runs of a study, each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from recipes.common.compare import SINGLE_TASK
from recipes.common.problem import Problem
from recipes.common.progress import run_with_progress
from recipes.common.training import be_a_quiet_worker, train_and_test
from recipes.methods import make_method, method_settings
from recipes.study.callbacks import make_callback
from recipes.study.problem import find_problem
from recipes.study.spec import RunSpec
from recipes.study.store import Record, Store, versions

__all__ = ["run_missing", "settings_of"]


def run_missing(specs: Sequence[RunSpec], folder: Path, jobs: int, console: Console) -> int:
    """Do the runs that are not stored yet.

    A run is stored by the process that did it as soon as it is finished: whatever ends the study, only the runs under
    way are lost.

    Args:
        specs: All runs.
        folder: Where runs are stored.
        jobs: Runs at a time.
        console: Where progress is shown.

    Returns:
        How many runs were done.

    Raises:
        RunFailedError: If a run fails.
        StoredRunError: If a stored run has other settings than the one asked for.
        ValueError: If a problem, method or callback is unknown.
    """
    store = Store(folder)
    missing = [spec for spec in specs if not store.has(spec, settings_of(spec))]
    # The runs of a pair one after the other: their times are compared, and other work on the machine comes and goes.
    missing.sort(key=lambda spec: (spec.task is not None, spec.problem, spec.seed))
    if missing:
        # Once, and not by every process: what data have to be made from is often downloaded or built.
        for problem in {spec.problem: find_problem(spec.problem) for spec in missing}.values():
            problem.make_data(problem.tasks, missing[0].seed).prepare_data()
        jobs_by_name = {spec.name: (spec, folder) for spec in missing}
        title = f"{len(specs) - len(missing)} of {len(specs)} runs are there; {jobs} at a time"
        for _ in run_with_progress(_train, jobs_by_name, jobs, be_a_quiet_worker, console, title):
            pass
    return len(missing)


def settings_of(spec: RunSpec) -> dict[str, str]:
    """The problem, the method and the callback of a run, spelled out.

    Raises:
        ValueError: If one of them is unknown, or cannot be told from another by how it is written out.
    """
    problem = _problem(spec)
    single, callback = spec.variant.method == SINGLE_TASK, spec.variant.callback
    settings = {
        "problem": repr(problem),
        "method": "none" if single else repr(method_settings(spec.variant.method, len(problem.tasks))),
        "callback": repr(make_callback(callback, problem, spec.seed)) if callback else "none",
    }
    for name, text in settings.items():
        if " at 0x" in text:
            raise ValueError(
                f"The {name} of the run {spec.name} has a part without a `__repr__` of its own, so that a stored run"
                f" could not be told from another: {text}. Write one."
            )
    return settings


def _problem(spec: RunSpec) -> Problem:
    return replace(find_problem(spec.problem), epochs=spec.epochs)


def _train(job: tuple[RunSpec, Path]) -> None:
    spec, folder = job
    problem = _problem(spec)
    tasks = problem.tasks if spec.task is None else (spec.task,)
    method = None if spec.task is not None else make_method(spec.variant.method, len(tasks))
    measured = train_and_test(
        lambda: problem.make_model(tasks, method),
        problem.make_data(tasks, spec.seed),
        seed=spec.seed,
        epochs=spec.epochs,
        teleport=make_callback(spec.variant.callback, problem, spec.seed) if spec.variant.callback else None,
        validate_every=max(1, spec.epochs // problem.evaluations),
        look_every=problem.look_every if spec.task is None else None,
        test_curve=True,
        callbacks=problem.make_callbacks(folder / spec.name) if spec.task is None else (),
    )
    unknown = set(problem.higher_is_better) - set(measured.test) if spec.task is None else set()
    if unknown:
        raise ValueError(
            f"`higher_is_better` of the problem {problem.title!r} names {sorted(unknown)}, which the model does not log"
            f" under val/ and test/; it logs {sorted(measured.test)}."
        )
    for report in measured.reports[1:]:
        report.trace.clear()
    Store(folder).save(Record(spec, settings_of(spec), versions(), measured))
