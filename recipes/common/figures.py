"""Figures that callbacks draw: as pixels, in files and in loggers."""

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
    """Refuse other models than the one whose predictions a callback draws; to be called in its `setup`.

    Raises:
        MisconfigurationException: If the model is of another kind.
    """
    if not isinstance(module, kind):
        raise MisconfigurationException(
            f"{type(callback).__name__} draws what a {kind.__name__} predicts; got a {type(module).__name__}."
        )


def to_pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure as an array (H, W, 3), without pyplot and its state."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_and_log(figure: Figure, path: Path, key: str, trainer: L.Trainer) -> None:
    """Write a figure, and hand it to the loggers that take images: TensorBoard's, and those with `log_image`.

    A `fast_dev_run`, which has no folder of its own, leaves nothing behind.

    Args:
        figure: The figure.
        path: Of the PNG file; its folder is made.
        key: Name of the image in loggers.
        trainer: Whose loggers, at its present step. To be called in the first process only.
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
