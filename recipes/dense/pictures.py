"""Callbacks that draw predictions for the validation data. They do not change the training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix
from typing_extensions import override

from recipes.common.figures import require_model, save_and_log
from recipes.dense.figures import confusion_figure, examples_figure
from recipes.dense.losses import IGNORED
from recipes.dense.model import DenseModel

__all__ = ["ConfusionMatrixPlot", "DensePictures"]


class ValidationFigure(L.Callback, ABC):
    """Draws a figure of a validation, from the predictions that were made for the metrics.

    It is written to `<name>/epoch_<number>.png`, or to `<name>/validation.png` outside a fit, and sent to loggers that
    take images: `TensorBoardLogger`, and those with `log_image`.

    Args:
        every_n_epochs: Draw in every n-th epoch and in the last one. Validations outside a fit are always drawn.
        folder: Where to write; None: the folder of the Trainer's logs.

    Attributes:
        name: Name of the figure in folders and loggers.

    Raises:
        ValueError: If the number is not positive.
    """

    name: str

    def __init__(self, every_n_epochs: int = 10, folder: str | Path | None = None) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} must be at least 1.")
        self.every_n_epochs = every_n_epochs
        self.folder = None if folder is None else Path(folder)
        self._is_due = False

    @abstractmethod
    def begin(self, trainer: L.Trainer, model: DenseModel) -> None:
        """Forget the previous validation."""

    @abstractmethod
    def collect(self, batch: Mapping[str, Tensor], predictions: Mapping[str, Tensor], batch_idx: int) -> None:
        """Look at a batch."""

    @abstractmethod
    def draw(self, model: DenseModel, title: str) -> Figure | None:
        """Draw the figure, or return None where there is none. Called in all processes."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse other models.

        Raises:
            MisconfigurationException: If the model is not a `DenseModel`.
        """
        require_model(self, pl_module, DenseModel)

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide whether to draw this validation."""
        assert isinstance(pl_module, DenseModel)
        number = trainer.current_epoch + 1
        fits = trainer.state.fn == TrainerFn.FITTING
        in_turn = number % self.every_n_epochs == 0 or number == trainer.max_epochs
        self._is_due = not trainer.sanity_checking and (in_turn or not fits)
        if self._is_due:
            self.begin(trainer, pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect what will be drawn."""
        if self._is_due:
            assert isinstance(outputs, Mapping)
            self.collect(batch, outputs, batch_idx)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, write and log the figure."""
        if not self._is_due:
            return
        assert isinstance(pl_module, DenseModel)
        # `log_dir` is broadcast, so all processes must ask for it.
        logs = Path(trainer.log_dir or trainer.default_root_dir)
        fits, epoch = trainer.state.fn == TrainerFn.FITTING, trainer.current_epoch
        figure = self.draw(pl_module, f"{pl_module.layout.name}, {f'epoch {epoch}' if fits else 'validation'}")
        if figure is None or not trainer.is_global_zero:
            return
        path = (self.folder or logs) / self.name / (f"epoch_{epoch:03d}.png" if fits else "validation.png")
        save_and_log(figure, path, self.name, trainer)


class DensePictures(ValidationFigure):
    """Draws images with their true and predicted targets.

    It shows the first example of some batches, always the same ones. They are spread evenly over the validation batches
    of the first process.

    Args:
        every_n_epochs: Draw in every n-th epoch and in the last one.
        num: Number of examples; fewer if there are fewer batches.
        folder: Where to write; None: the folder of the Trainer's logs.

    Raises:
        ValueError: If a number is not positive.
    """

    name = "pictures"

    def __init__(self, every_n_epochs: int = 10, num: int = 4, folder: str | Path | None = None) -> None:
        super().__init__(every_n_epochs, folder)
        if num < 1:
            raise ValueError(f"num={num} must be at least 1.")
        self.num = num
        self._examples: list[dict[str, Tensor]] = []
        self._batches: set[int] = set()

    @override
    def begin(self, trainer: L.Trainer, model: DenseModel) -> None:
        """Choose the batches."""
        batches = int(trainer.num_val_batches[0])
        num = min(self.num, batches)
        self._batches = {batches * index // num for index in range(num)}
        self._examples = []

    @override
    def collect(self, batch: Mapping[str, Tensor], predictions: Mapping[str, Tensor], batch_idx: int) -> None:
        """Keep the first example of a chosen batch."""
        if batch_idx in self._batches:
            seen = {**batch, **{f"predicted_{task}": values for task, values in predictions.items()}}
            # A view would keep the whole batch in memory. Matplotlib cannot draw half precision.
            first = {name: values[0].detach().cpu().clone() for name, values in seen.items()}
            self._examples.append({name: x.float() if x.is_floating_point() else x for name, x in first.items()})

    @override
    def draw(self, model: DenseModel, title: str) -> Figure | None:
        """Draw the grid in the first process."""
        examples, self._examples = self._examples, []
        return examples_figure(model.layout, examples, title) if model.global_rank == 0 else None


class ConfusionMatrixPlot(ValidationFigure):
    """Draws the confusion matrix of the segmentation, over the whole split and all processes."""

    name = "confusion"
    _matrix: MulticlassConfusionMatrix | None = None

    @override
    def begin(self, trainer: L.Trainer, model: DenseModel) -> None:
        """Count from zero."""
        self._matrix = None
        if "segmentation" in model.tasks:
            matrix = MulticlassConfusionMatrix(len(model.layout.classes), ignore_index=IGNORED)
            self._matrix = matrix.to(model.device)

    @override
    def collect(self, batch: Mapping[str, Tensor], predictions: Mapping[str, Tensor], batch_idx: int) -> None:
        """Count pixels."""
        if self._matrix is not None:
            self._matrix.update(predictions["segmentation"], batch["segmentation"])

    @override
    def draw(self, model: DenseModel, title: str) -> Figure | None:
        """Draw the matrix, or nothing without a segmentation."""
        if self._matrix is None:
            return None
        return confusion_figure(self._matrix.compute(), model.layout.classes, title)
