"""The progress bar while a teleport runs."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_cost._lightning.progress import StageDisplay
from tests.support.nets import Net, make_batches, make_trainer


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bar_shows_a_running_teleport(bar: Any, capsys: Any) -> None:
    descriptions: list[str | None] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            display = StageDisplay(trainer, patience=0.0)
            original = display._describe("Epoch")
            display._describe(str(original))
            with display:
                display("candidate")
                descriptions.append(display._describe("teleporting: candidate"))
            descriptions.append(display._describe(str(original)))
            descriptions.append(original)

    trainer = make_trainer(enable_progress_bar=True, callbacks=[bar(), Watch()])
    trainer.fit(Net(), torch.utils.data.DataLoader(make_batches(1), batch_size=None))
    shown, restored, original = descriptions
    assert shown == "teleporting: candidate"
    assert restored == original


def test_silent_without_a_progress_bar() -> None:
    with StageDisplay(make_trainer(), patience=0.0) as display:
        display("candidate")
