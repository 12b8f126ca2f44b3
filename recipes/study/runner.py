"""Runs what is missing of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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


def run_missing(specs: Sequence[RunSpec], store: Store, jobs: int, console: Console) -> int:
    """Run what is not stored yet, several runs at a time, and return the number of these runs.

    Each worker process stores its run when it is finished. If the study is interrupted, only unfinished runs are lost.

    Raises:
        RunFailedError: If a run fails.
        StoredRunError: If a stored run has other settings than the requested one.
        ValueError: If a problem, method or callback is unknown.
    """
    missing = [spec for spec in specs if not store.has(spec, settings_of(spec))]
    # The runs of a pair follow each other. Their times are compared, and the load of the machine changes.
    missing.sort(key=lambda spec: (spec.task is not None, spec.problem, spec.seed))
    if missing:
        # Data are downloaded or built once, before the processes start.
        for problem in {spec.problem: find_problem(spec.problem) for spec in missing}.values():
            problem.make_data(problem.tasks, missing[0].seed).prepare_data()
        jobs_by_name = {spec.name: (spec, store) for spec in missing}
        title = f"{len(specs) - len(missing)} of {len(specs)} runs are there; {jobs} at a time"
        for _ in run_with_progress(_train, jobs_by_name, jobs, be_a_quiet_worker, console, title):
            pass
    return len(missing)


def settings_of(spec: RunSpec) -> dict[str, str]:
    """The problem, the method and the callback of a run as text.

    Raises:
        ValueError: If one of them is unknown, or its text differs from one process to the next.
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
                f"The {name} of the run {spec.name} has a part without a `__repr__` of its own: {text}. Write one, so"
                " that stored runs can be told apart."
            )
    return settings


def _problem(spec: RunSpec) -> Problem:
    return replace(find_problem(spec.problem), epochs=spec.epochs)


def _train(job: tuple[RunSpec, Store]) -> None:
    spec, store = job
    problem, single = _problem(spec), spec.task is not None
    tasks = problem.tasks if spec.task is None else (spec.task,)
    method = None if single else make_method(spec.variant.method, len(tasks))
    measured = train_and_test(
        lambda: problem.make_model(tasks, method),
        problem.make_data(tasks, spec.seed),
        seed=spec.seed,
        epochs=spec.epochs,
        compared=make_callback(spec.variant.callback, problem, spec.seed) if spec.variant.callback else None,
        validate_every=max(1, spec.epochs // problem.evaluations),
        look_every=None if single else problem.look_every,
        test_curve=True,
        accelerator=problem.accelerator,
        callbacks=() if single else problem.make_callbacks(store.folder / spec.name),
    )
    unknown = set() if single else set(problem.higher_is_better) - set(measured.test)
    if unknown:
        raise ValueError(
            f"`higher_is_better` of the problem {problem.title!r} names {sorted(unknown)}, which the model does not log"
            f" under val/ and test/; it logs {sorted(measured.test)}."
        )
    store.save(Record(spec, settings_of(spec), versions(), measured))
