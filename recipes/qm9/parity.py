"""A figure of the predicted against the true values of every target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from recipes.common.figures import save_and_log
from recipes.qm9.model import QM9Model
from recipes.qm9.targets import TARGETS

__all__ = ["ParityPlot", "parity_figure"]

_COLUMNS = 4
# Percentage at either end that a panel leaves out, because a few extreme values would squeeze all others together.
_OUTLIERS = 0.1


def parity_figure(predictions: Mapping[str, np.ndarray], truths: Mapping[str, np.ndarray]) -> Figure:
    """Draw one panel per target with predictions, true values and the mean absolute error.

    The axes leave out 0.1 % of the true values at either end. The error includes them.

    Args:
        predictions: Target to its predictions (N,), in the reported units.
        truths: The same targets to their true values.

    Raises:
        ValueError: If the names differ.
    """
    if predictions.keys() != truths.keys():
        raise ValueError(f"`predictions` has {list(predictions)} and `truths` {list(truths)}; the names must agree.")
    rows = -(-len(predictions) // _COLUMNS)
    columns = min(len(predictions), _COLUMNS)
    figure = Figure(figsize=(3.2 * columns, 3.1 * rows), layout="constrained", dpi=120)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, (name, predicted) in zip(axes, predictions.items(), strict=False):
        true, unit = truths[name], TARGETS[name].report_unit
        low, high = np.percentile(true, [_OUTLIERS, 100 - _OUTLIERS])
        ax.plot([low, high], [low, high], color="0.6", linewidth=0.8)
        ax.scatter(true, predicted, s=3, alpha=0.3, linewidths=0, rasterized=True)
        margin = 0.03 * (high - low)
        ax.set(
            xlim=(low - margin, high + margin),
            ylim=(low - margin, high + margin),
            title=f"{name}: MAE {np.abs(predicted - true).mean():.4g} {unit}",
            xlabel=f"true [{unit}]",
            ylabel="predicted",
        )
        ax.title.set_fontsize("medium")
        ax.locator_params(nbins=4)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(predictions) :]:
        ax.set_visible(False)
    return figure


class ParityPlot(L.Callback):
    """Writes `parity.png` and `predictions.npz` when the model is tested. Loggers that take images get the figure too.

    Args:
        folder: Where to write; None: the folder of the Trainer's logs.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._outputs: list[Mapping[str, Tensor]] = []

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse tests on several devices, each of which sees a part of the molecules.

        Raises:
            MisconfigurationException: If the Trainer has several devices.
        """
        if stage == "test" and trainer.world_size > 1:
            raise MisconfigurationException(
                f"ParityPlot needs all test molecules on one device, but there are {trainer.world_size}: test with"
                " `--trainer.devices 1`."
            )

    @override
    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier test."""
        self._outputs.clear()

    @override
    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Tensor] | None,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the predictions."""
        assert isinstance(outputs, Mapping)
        self._outputs.append({name: values.cpu() for name, values in outputs.items()})

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write both files."""
        assert isinstance(pl_module, QM9Model)
        predictions, truths = (
            dict(zip(pl_module.targets, torch.cat([output[kind] for output in self._outputs]).numpy().T, strict=True))
            for kind in ("predictions", "targets")
        )
        folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir)
        save_and_log(parity_figure(predictions, truths), folder / "parity.png", "test/parity", trainer)
        np.savez_compressed(
            folder / "predictions.npz",
            **{f"{name}_predicted": values for name, values in predictions.items()},
            **{f"{name}_true": values for name, values in truths.items()},
        )
