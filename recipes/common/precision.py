"""Precisions that recipes refuse."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["refuse_half_precision"]


def refuse_half_precision(trainer: L.Trainer) -> None:
    """Refuse a Trainer that casts the batches to half precision. Call it in the `setup` of models of measured targets.

    Raises:
        MisconfigurationException: If the Trainer casts the batches to half precision.
    """
    if trainer.precision in ("bf16-true", "16-true"):
        raise MisconfigurationException(
            f"precision={trainer.precision!r} rounds the targets. Use 'bf16-mixed', which keeps weights and targets in"
            " single precision."
        )
