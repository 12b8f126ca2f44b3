"""The problems that studies train on."""

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

__all__ = ["Problem", "checked_root"]


@dataclass(frozen=True, kw_only=True)
class Problem(ABC):
    """Tasks, data and a network. Subclass it for your own module, with a field for everything that you want to vary.

    Attributes:
        title: Title in tables and figures.
        tasks: Names of the tasks.
        epochs: Number of epochs.
        evaluations: How many times to evaluate during training.
        look_every: Look at losses and conflict in one of so many steps.
        accelerator: That of the Trainer. Equal *time* compares CPU time, so it says something on a CPU only.
        multi_task_fields: Fields that do not affect a single task. Problems that differ only in these share their
            single-task baselines.
    """

    multi_task_fields: ClassVar[frozenset[str]] = frozenset()

    title: str
    tasks: tuple[str, ...]
    epochs: int
    evaluations: int = 12
    look_every: int = 10
    accelerator: str = "cpu"

    @property
    @abstractmethod
    def higher_is_better(self) -> Mapping[str, bool]:
        """The metrics that the model logs under `val/` and `test/`, and whether a higher value is better."""

    @abstractmethod
    def make_model(self, tasks: Sequence[str], method: Aggregator | Scalarizer | None) -> L.LightningModule:
        """Make a `MultiTaskMixin` for some of the tasks; called after seeding.

        Args:
            tasks: All tasks, or the one of a single-task baseline.
            method: The multi-task method of the model; None for the mean of the losses.
        """

    @abstractmethod
    def make_data(self, tasks: Sequence[str], seed: int) -> L.LightningDataModule:
        """Make the data. Only the order of the training batches may depend on `seed`, so that runs can be paired."""

    def make_callbacks(self, folder: Path) -> list[Callback]:
        """Make more callbacks for every multi-task run; none by default. They may write to `folder`."""
        return []


def checked_root(root: str) -> str:
    """The folder of the data of a problem.

    Raises:
        ValueError: If none is set.
    """
    if not root:
        raise ValueError("The problem needs the folder of its data, which its README describes: --set root=DIR.")
    return root
