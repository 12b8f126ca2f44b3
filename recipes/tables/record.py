"""Writes what a test measured."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
from typing_extensions import override

from recipes.common.files import replacing

__all__ = ["TestRecord"]


class TestRecord(L.Callback):
    """Writes the metrics `test/...` of a test to a JSON file.

    Args:
        path: The file.
    """

    __test__ = False  # Not for pytest to collect.

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write them on the first process."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        means = {name.removeprefix("test/"): value for name, value in values.items() if name.startswith("test/")}
        if trainer.is_global_zero:
            with replacing(self.path) as unfinished:
                unfinished.write_text(json.dumps({"means": means}, indent=1) + "\n", encoding="utf-8")
