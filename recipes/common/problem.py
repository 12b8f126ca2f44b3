"""What runs train on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

__all__ = ["Problem"]


@dataclass(frozen=True, kw_only=True)
class Problem(ABC):
    """Tasks, data and a network for them. Subclass it for your own module, and give the fields that you want to vary.

    Attributes:
        title: What tables and figures call it.
        tasks: Names of the tasks.
        epochs: How long to train.
        evaluations: How often to evaluate along training.
        look_every: Look at losses and conflict in every n-th step.
        multi_task_fields: Fields that change nothing for a single task, so that its baselines can be shared.
    """

    multi_task_fields: ClassVar[frozenset[str]] = frozenset()

    title: str
    tasks: tuple[str, ...]
    epochs: int
    evaluations: int = 12
    look_every: int = 10

    @property
    @abstractmethod
    def higher_is_better(self) -> Mapping[str, bool]:
        """The metrics that the model logs under `val/` and `test/`, and whether a higher value is better."""

    @abstractmethod
    def make_model(self, tasks: Sequence[str], method: Aggregator | Scalarizer | None) -> L.LightningModule:
        """A fresh model, a `MultiTaskMixin`, for some of the tasks; called after the seed was set.

        Args:
            tasks: All tasks, or the one of a single-task baseline.
            method: The multi-task method, the model's to use; None for the mean of the losses.
        """

    @abstractmethod
    def make_data(self, tasks: Sequence[str], seed: int) -> L.LightningDataModule:
        """The data; `seed` decides the order of the training batches and nothing else, so that runs can be paired."""

    def make_callbacks(self, folder: Path) -> list[Callback]:
        """Callbacks that every run of all tasks has, beside the one that is studied; none by default.

        Args:
            folder: A folder of the run's own, for what they write.
        """
        return []
