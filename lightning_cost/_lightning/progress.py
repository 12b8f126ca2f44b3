"""A line in the progress bar while a teleport runs."""

from __future__ import annotations

import time
from types import TracebackType

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

__all__: list[str] = []


class StageDisplay:
    """Shows in the training bar what a teleport is doing, and restores the description of the bar on exit.

    If the Trainer has no progress bar, nothing is shown. Most teleports are too short to show: the bar would flicker,
    and writing to it would take longer than the teleport. So the description changes only after a while.

    Args:
        trainer: The Trainer whose bar to use.
        patience: Seconds before anything is shown, and between changes.
    """

    def __init__(self, trainer: Trainer, patience: float = 0.2) -> None:
        self._bar = trainer.progress_bar_callback
        self._patience = patience
        self._last = 0.0
        self._original: str | None = None

    def __enter__(self) -> StageDisplay:
        self._last = time.monotonic()
        return self

    def __call__(self, stage: str) -> None:
        """Show a stage, if enough time has passed."""
        now = time.monotonic()
        if now - self._last >= self._patience:
            self._last = now
            previous = self._describe(f"teleporting: {stage}")
            self._original = previous if self._original is None else self._original

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._original is not None:
            self._describe(self._original)

    def _describe(self, text: str) -> str | None:
        """Set the description; returns the one before, or ``None`` without a bar."""
        bar = self._bar
        if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
            previous = str(bar.train_progress_bar.desc).removesuffix(": ")
            bar.train_progress_bar.set_description(text)
            return previous
        if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.train_progress_bar_id is not None:
            assert bar.progress is not None
            task = bar.progress.tasks[bar.progress.task_ids.index(bar.train_progress_bar_id)]
            previous = task.description
            bar.progress.update(bar.train_progress_bar_id, description=text)
            bar.progress.refresh()
            return previous
        return None
