"""Saving and logging of figures that callbacks draw."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

__all__ = ["require_model", "save_and_log", "to_pixels"]


def require_model(callback: L.Callback, module: L.LightningModule, kind: type[L.LightningModule]) -> None:
    """Refuse a model whose predictions a callback cannot draw. Call it in the `setup` of the callback.

    Raises:
        MisconfigurationException: If the model is of another kind.
    """
    if not isinstance(module, kind):
        raise MisconfigurationException(
            f"{type(callback).__name__} draws what a {kind.__name__} predicts; got a {type(module).__name__}."
        )


def to_pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure as an array (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_and_log(figure: Figure, path: Path, key: str, trainer: L.Trainer) -> None:
    """Save a figure, and log it to TensorBoard and to loggers with `log_image`. Call it in the first process only.

    The folder of `path` is made. `key` is the name of the image in loggers. In a `fast_dev_run` nothing is saved.
    """
    pixels = to_pixels(figure)
    if trainer.fast_dev_run:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, pixels, trainer.global_step, dataformats="HWC")
        elif callable(getattr(logger, "log_image", None)):
            logger.log_image(key=key, images=[pixels], step=trainer.global_step)  # type: ignore[attr-defined]
