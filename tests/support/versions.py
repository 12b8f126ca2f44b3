"""What depends on the versions of the libraries that the tests run with."""

from __future__ import annotations

import inspect
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

UNSAFE_LOAD: dict[str, Any] = (
    {"weights_only": False} if "weights_only" in inspect.signature(L.Trainer.fit).parameters else {}
)
"""Options of ``Trainer.fit`` to load a checkpoint with objects in it. Lightning 2.5 always does."""

needs_save_on_exception = pytest.mark.skipif(
    "save_on_exception" not in inspect.signature(ModelCheckpoint).parameters, reason="needs Lightning 2.6"
)
