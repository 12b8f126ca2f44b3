"""What the recipes share: files, recorded runs and worker processes."""

import gc
import math
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from itertools import pairwise

import lightning as L
import pytest
import torch

from lightning_cost import SymmetryTeleportCallback
from recipes.common.compare import Estimate
from recipes.common.files import replacing
from recipes.common.looks import is_looked_at
from recipes.common.parallel import RunFailedError, run_all
from recipes.common.training import Recorder, train_and_test
from recipes.digits import DigitsDataModule, DigitsModel

pytestmark = pytest.mark.slow

# --------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_complete_or_as_it_was(tmp_path):
    path = tmp_path / "0.npy"
    with replacing(path) as unfinished:
        unfinished.write_bytes(b"whole")
        assert not path.exists()
    with pytest.raises(TypeError), replacing(path) as unfinished:
        unfinished.write_text(0)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"0.npy": b"whole"}


# ------------------------------------------------------------------------------------------------------------ training

SMALL = {"num_train": 640, "num_val": 64, "num_test": 64}


@pytest.fixture(scope="module")
def trained():
    """The same short training three times, by name; also the models."""
    torch.set_num_threads(1)
    models = {}

    def train(name, teleport=None, look_every=1):
        def make_model():
            models[name] = DigitsModel(width=16, loss_weights={"right": 0.03})
            return models[name]

        data = DigitsDataModule(**SMALL, shuffle_seed=3)
        return train_and_test(make_model, data, seed=3, epochs=3, compared=teleport, look_every=look_every)

    measured = {
        "plain": train("plain"),
        "unwatched": train("unwatched", look_every=None),
        "cost": train("cost", SymmetryTeleportCallback()),
    }
    return measured, models


def test_looking_changes_nothing(trained):
    measured, models = trained
    assert measured["plain"].test == measured["unwatched"].test
    watched, unwatched = models["plain"].state_dict(), models["unwatched"].state_dict()
    assert all(torch.equal(watched[name], unwatched[name]) for name in unwatched)
    assert measured["unwatched"].looks == []


def test_every_step_is_looked_at_before_the_teleport(trained):
    measured, _ = trained
    looks, reports = measured["cost"].looks, measured["cost"].reports
    assert [look.step for look in looks] == list(range(30))
    assert len(reports) > 0
    # The callback checks from the second epoch on, with the trigger that the recorder has.
    assert [look.step for look in looks if look.conflict and look.step >= 10] == [report.step for report in reports]
    for report in reports:
        assert looks[report.step].losses == pytest.approx(report.losses_before, rel=1e-6)
        assert looks[report.step].cosine == pytest.approx(min(report.cosines_before.values()), rel=1e-4)
    # Of two tasks only the one with the smaller gradient can conflict with the mean.
    assert all(look.conflict == look.majority == (look.cosine < 0) for look in looks)
    assert all(look.weak for look in looks if look.conflict)


def test_paired_runs_are_the_same_until_the_first_teleport(trained):
    measured, _ = trained
    plain, cost = measured["plain"], measured["cost"]
    first = cost.reports[0].step
    assert plain.looks[: first + 1] == cost.looks[: first + 1]
    assert plain.looks[first + 1 :] != cost.looks[first + 1 :]
    assert plain.validation[0] == cost.validation[0]


def test_what_a_run_reports(trained):
    measured, _ = trained
    plain = measured["plain"]
    assert plain.steps == 30
    assert [evaluation.step for evaluation in plain.validation] == [10, 20, 30]
    assert set(plain.test) == set(plain.validation[0].metrics) == {"left_accuracy", "right_accuracy"}
    assert plain.reports == []
    assert plain.cpu_seconds > 0
    assert plain.seconds > 0


@pytest.mark.parametrize("period", [2, 3, 4, 5, 8, 10])
@pytest.mark.parametrize("every", [7, 10, 26])
def test_what_is_done_periodically_is_as_frequent_in_the_steps_that_are_looked_at(every, period):
    looks = [step for step in range(200_000) if is_looked_at(step, every)]
    assert len(looks) in (200_000 // every, math.ceil(200_000 / every))
    assert all(later // every == earlier // every + 1 for earlier, later in pairwise(looks))
    share = sum(step % period == 0 for step in looks) / len(looks)
    assert share == pytest.approx(1 / period, rel=0.05)


def test_one_of_n_steps_is_looked_at():
    data = DigitsDataModule(**SMALL)
    measured = train_and_test(lambda: DigitsModel(width=4), data, seed=0, epochs=2, validate_every=2, look_every=7)
    assert [look.step for look in measured.looks] == [step for step in range(20) if is_looked_at(step, 7)]
    assert len(measured.looks) in (2, 3)
    assert [evaluation.step for evaluation in measured.validation] == [20]
    with pytest.raises(ValueError, match="every=0"):
        Recorder(every=0)


# ------------------------------------------------------------------------------------------------------------ parallel


# A function that any process can import by its name.
nothing = gc.collect


def children():
    return set(multiprocessing.active_children())


def assert_gone(processes):
    # No join: the pool's own thread waits for them too, and of two waiters one may call a process alive whose end the
    # other is just writing down.
    deadline = time.monotonic() + 60
    while any(process.is_alive() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_run_gives_its_result_in_another_process():
    specs = {"process": "__import__('os').getpid()", "sum": "1 + 1", "torch": "'torch' in __import__('sys').modules"}
    results = dict(run_all(eval, specs, jobs=2, prepare=nothing))
    assert results.keys() == specs.keys()
    assert results["sum"] == 2
    assert results["process"] != os.getpid()
    assert not results["torch"]  # What a run does not need is not loaded.


def test_workers_are_prepared_first(tmp_path):
    specs = {"folder": "__import__('os').getcwd()"}
    assert dict(run_all(eval, specs, jobs=1, prepare=partial(os.chdir, tmp_path))) == {"folder": str(tmp_path)}


def test_a_failing_run_is_named_with_its_traceback_and_ends_the_others():
    before = children()
    specs = {"bad": "1 / 0", "long": "__import__('time').sleep(600)", "never": "1"}
    began = time.monotonic()
    with pytest.raises(RunFailedError, match=r"(?s)The run 'bad' failed:\nTraceback.*ZeroDivisionError") as failure:
        list(run_all(eval, specs, jobs=2, prepare=nothing))
    assert "long" not in str(failure.value)
    assert_gone(children() - before)
    assert time.monotonic() - began < 300


def test_a_worker_that_dies_is_reported_with_the_runs_it_may_have_been_in():
    specs = {"fine": "1", "dies": "__import__('os')._exit(3)", "later": "1"}
    with pytest.raises(RunFailedError, match=r"died without a traceback.*\['dies'\]"):
        list(run_all(eval, specs, jobs=1, prepare=nothing))


def test_ctrl_c_ends_the_workers():
    # A process started in the background ignores SIGINT, and so would this test.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = children()
    began = time.monotonic()
    workers = set()

    def interrupt_once_it_runs():
        while not workers:
            workers.update(children() - before)
            time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt_once_it_runs)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_all(eval, {"long": "__import__('time').sleep(60)"}, jobs=1, prepare=nothing))
    finally:
        signal.signal(signal.SIGINT, previous)
    thread.join()
    assert workers
    assert_gone(workers)
    assert time.monotonic() - began < 300


def test_giving_up_the_iteration_ends_the_workers():
    before = children()
    runs = run_all(eval, {"short": "1", "long": "__import__('time').sleep(600)"}, jobs=2, prepare=nothing)
    assert next(runs) == ("short", 1)
    workers = children() - before
    assert workers
    runs.close()
    assert_gone(workers)


def test_there_must_be_a_job():
    with pytest.raises(ValueError, match="jobs=0"):
        next(run_all(eval, {"a": "1"}, jobs=0, prepare=nothing))


# --------------------------------------------------------------------------------------------------- estimates, clock


def test_estimate_of_hand_computed_values():
    # Deviations -2, 0, 2: variance 8 / 2, standard error sqrt(4 / 3).
    assert Estimate.of([1.0, 3.0, 5.0]) == Estimate(3.0, pytest.approx(math.sqrt(4 / 3)))
    assert Estimate.of([7.0]).mean == 7.0
    assert math.isnan(Estimate.of([7.0]).error)


class Clocked(DigitsModel):
    """Takes a second per step, and five in each step that is looked at."""

    def task_losses(self, batch, batch_idx):
        clock["now"] += 5.0 if is_looked_at(self.trainer.global_step, 4) else 1.0
        return super().task_losses(batch, batch_idx)

    def on_validation_epoch_end(self):
        clock["now"] += 100.0
        self.log("val/late", 7.0)


clock = {"now": 0.0}


def test_the_clock_leaves_out_looks_and_evaluations_and_the_last_epoch_is_evaluated(monkeypatch):
    monkeypatch.setattr("recipes.common.training.time.process_time", lambda: clock["now"])
    measured = train_and_test(
        lambda: Clocked(width=4), DigitsDataModule(**SMALL), seed=0, epochs=5, validate_every=2, look_every=4
    )
    assert [evaluation.step for evaluation in measured.validation] == [20, 40, 50]
    assert [evaluation.seconds for evaluation in measured.validation] == pytest.approx([20, 40, 50])
    assert [evaluation.metrics["late"] for evaluation in measured.validation] == [7.0] * 3


class Periodic(L.Callback):
    """Takes seven seconds in every second step, whether it is looked at or not."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        clock["now"] += 7.0 * (batch_idx % 2)


def test_the_clock_counts_what_a_callback_does_in_every_second_step(monkeypatch):
    monkeypatch.setattr("recipes.common.training.time.process_time", lambda: clock["now"])
    data = DigitsDataModule(**{**SMALL, "num_train": 800, "batch_size": 4})
    periodic = Periodic()
    measured = train_and_test(
        lambda: Clocked(width=4), data, seed=0, epochs=1, look_every=4, compared=periodic, validate_every=1
    )
    steps = measured.steps
    assert steps == 200
    # Looks at fixed steps would find all of these seconds in them, or none.
    assert measured.validation[-1].seconds == pytest.approx(steps * (1 + 7 / 2), rel=0.1)
