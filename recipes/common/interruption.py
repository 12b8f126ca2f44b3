"""Interrupting a training so that it can go on as if it had not been interrupted.

A signal can come at any instant, but a training can be resumed exactly only between two steps. So the first Ctrl-C (or
SIGTERM) asks the training to stop: it finishes the step, and the validation if one is due, and writes a checkpoint
before it would draw the next batch. The second one stops it at once, and leaves the checkpoint of the last epoch alone.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

__all__ = ["Interrupted", "LastCheckpoint", "ignore_interrupts", "stop_if_interrupted"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Raised between two steps after a signal."""


class _Requests:
    """Whether a training has been asked to stop, and whether it is between two steps when it draws a batch."""

    stop = False
    training = False


def stop_if_interrupted() -> None:
    """Stop the training if it has been asked to. Call it before each training batch is drawn.

    Raises:
        Interrupted: If it has been asked to.
    """
    if _Requests.stop and _Requests.training:
        raise Interrupted


def ignore_interrupts(worker: int = 0) -> None:
    """Leave Ctrl-C to the main process; for worker processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt` from the end of the last epoch, or from where a signal has stopped the training.

    A run that is resumed from it equals one that was not interrupted. With several processes, signals are left to
    Lightning, because the processes would stop at different steps.

    Args:
        filename: Name of the checkpoint, without its ending.
        kwargs: More arguments of `ModelCheckpoint`.
    """

    def __init__(self, filename: str = "last", **kwargs: Any) -> None:
        super().__init__(filename=filename, enable_version_counter=False, **kwargs)
        self._handlers: dict[signal.Signals, Any] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        _Requests.stop, _Requests.training = False, True
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._ask_to_stop) for number in _SIGNALS}

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        _Requests.training = False

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        _Requests.training = bool(self._handlers)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._restore()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()
        # At the beginning of an epoch, the checkpoint of the epoch before is there already.
        if isinstance(exception, Interrupted) and trainer.fit_loop.epoch_loop.batch_progress.current.completed:
            assert self.dirpath is not None
            trainer.save_checkpoint(str(Path(self.dirpath) / f"{self.filename}{self.FILE_EXTENSION}"))

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if _Requests.stop:
            self._restore()
            raise KeyboardInterrupt
        _Requests.stop = True
        print("\nStopping after this step, and the validation if one is due. Once more to stop at once.", flush=True)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        _Requests.stop = _Requests.training = False
