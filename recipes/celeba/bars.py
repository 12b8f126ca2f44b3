"""A figure of the F1 of every attribute, beside its single-task value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from typing_extensions import override

from recipes.celeba.model import CelebAModel
from recipes.common.figures import require_model, save_and_log

__all__ = ["AttributeBars", "bar_figure"]

# Two of Okabe and Ito's colors, which most color-blind readers can tell apart.
_BETTER, _WORSE = "#0072B2", "#D55E00"


def bar_figure(scores: Mapping[str, float], single_task: Mapping[str, float]) -> Figure:
    """Draw one bar per attribute, with a mark at its single-task value. The color shows whether it is reached.

    Args:
        scores: Attribute to F1.
        single_task: The same attributes to the F1 of single-task models.

    Raises:
        ValueError: If the attributes differ.
    """
    if scores.keys() != single_task.keys():
        raise ValueError(f"Attributes of `scores`, {list(scores)}, and `single_task`, {list(single_task)}, must agree.")
    figure = Figure(figsize=(7, 1.2 + 0.21 * len(scores)), layout="constrained", dpi=120)
    ax = figure.subplots()
    places, values = np.arange(len(scores)), np.array(list(scores.values()))
    against = np.array([single_task[name] for name in scores])
    for reached, color, label in ((True, _BETTER, "F1, as single-task or better"), (False, _WORSE, "F1, worse")):
        shown = (values >= against) == reached
        ax.barh(places[shown], values[shown], color=color, label=label)
    ax.plot(against, places, "|", color="black", markersize=9, markeredgewidth=1.6, label="single-task F1")
    ax.set_yticks(places, [name.replace("_", " ") for name in scores], fontsize="small")
    ax.set(
        xlim=(0, 1),
        ylim=(len(scores) - 0.4, -0.6),
        xlabel=f"F1; mean {values.mean():.3f}, single-task {against.mean():.3f}",
    )
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    return figure


class AttributeBars(L.Callback):
    """Draws the F1 of each attribute beside the single-task values, after validations and tests.

    The figure is written to `f1_val.png`, which the next validation replaces, or to `f1_test.png`. Loggers that take
    images (`TensorBoardLogger`, and those with `log_image`) get it as `val/f1` or `test/f1`. The training is not
    changed.

    Args:
        folder: Where to write; None: the folder of the Trainer's logs.
        every_n_epochs: Draw in every n-th epoch. Tests are always drawn.

    Raises:
        ValueError: If `every_n_epochs` is below 1.
    """

    def __init__(self, folder: str | Path | None = None, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} must be at least 1.")
        self.folder = None if folder is None else Path(folder)
        self.every_n_epochs = every_n_epochs

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse other models.

        Raises:
            MisconfigurationException: If the model is not a `CelebAModel`.
        """
        require_model(self, pl_module, CelebAModel)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw if the epoch is due, but not in the sanity check."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        due = not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val")

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        self._draw(trainer, pl_module, "test")

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # `log_dir` is broadcast, so all processes must ask for it.
        log_dir = trainer.log_dir
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, CelebAModel)
        logged = trainer.callback_metrics
        scores = {name: float(logged[f"{stage}/{name}_f1"]) for name in pl_module.attributes}
        folder = self.folder or Path(log_dir or trainer.default_root_dir)
        figure = bar_figure(scores, pl_module.single_task_f1)
        save_and_log(figure, folder / f"f1_{stage}.png", f"{stage}/f1", trainer)
