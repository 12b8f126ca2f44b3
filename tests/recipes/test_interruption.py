"""A training that is interrupted and resumed equals one that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from recipes.common.interruption import Interrupted, LastCheckpoint, stop_if_interrupted
from tests.support.nets import Net, assert_same_parameters, fit, make_batches

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_signal_may_come_at_any_instant(tmp_path: Path) -> None:
    """47 instants: in each hook, in the losses, in a teleport and in the optimizer, early and late."""
    command = [sys.executable, "-m", "tests.support.interrupted_run", str(tmp_path)]
    finished = subprocess.run(command, check=False, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    lines = [line for line in finished.stdout.splitlines() if line.startswith(("(", "instants"))]
    assert lines == ["instants 47"]


def run(folder: Path, *more: str) -> list[str]:
    settings = [f"--config={ROOT}/recipes/digits/upgrad_cost.yaml", "--trainer.max_epochs=4"]
    settings += ["--trainer.callbacks+=recipes.common.interruption.LastCheckpoint"]
    return [sys.executable, "-m", "recipes.digits", "fit", *settings, f"--trainer.logger.save_dir={folder}", *more]


def test_a_signal_from_outside(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a recipe, at an instant that nobody chose."""
    subprocess.run(run(tmp_path / "whole"), check=True, cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    process = subprocess.Popen(
        run(tmp_path / "part"), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "part" / "digits" / "upgrad_cost" / "version_0" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(metrics.glob("*.ckpt")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Stopping after this step" in output
    assert "Traceback" not in output
    (last,) = (tmp_path / "part").rglob("last.ckpt")
    resumed = run(tmp_path / "rest", f"--ckpt_path={last}")
    subprocess.run(resumed, check=True, cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    (one,), (two,) = ((tmp_path / name).rglob("last.ckpt") for name in ("whole", "rest"))
    first, second = (torch.load(path, weights_only=True) for path in (one, two))
    assert first["global_step"] == second["global_step"]
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


class Strikes(L.Callback):
    """Sends a signal once or twice at a step."""

    def __init__(self, step: int, *numbers: signal.Signals) -> None:
        self.step, self.numbers = step, numbers

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _handlers() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_signal_stops_at_once_and_writes_nothing(tmp_path: Path) -> None:
    strikes = Strikes(2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(
            Net(),
            make_batches(4),
            callbacks=[strikes, LastCheckpoint(dirpath=tmp_path)],
            enable_checkpointing=True,
            max_epochs=2,
        )
    assert not list(tmp_path.iterdir())


def test_an_error_within_a_step_leaves_the_checkpoint_of_the_epoch_alone(tmp_path: Path) -> None:
    class Fails(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 1 and batch_idx == 1:
                raise ArithmeticError
            return super().task_losses(batch, batch_idx)

    with pytest.raises(ArithmeticError):
        fit(
            Fails(),
            make_batches(3),
            callbacks=[LastCheckpoint(dirpath=tmp_path)],
            enable_checkpointing=True,
            max_epochs=2,
        )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_handlers_are_those_of_before_after_a_fit(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    module = Net()
    fit(module, make_batches(2), callbacks=[LastCheckpoint(dirpath=tmp_path)], enable_checkpointing=True)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    plain = Net()
    fit(plain, make_batches(2))
    assert_same_parameters(module, plain)
    stop_if_interrupted()
    assert issubclass(Interrupted, KeyboardInterrupt)
