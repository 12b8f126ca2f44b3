"""What studies train on, on the data of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recipes.dense.data import DenseDataModule
from recipes.dense.model import DenseModel
from recipes.dense.problem import DenseProblem
from recipes.nyuv2 import NYUV2, NYUv2DataModule, NYUv2Model

__all__ = ["PROBLEMS", "NYUv2Problem"]


@dataclass(frozen=True, kw_only=True)
class NYUv2Problem(DenseProblem):
    """NYUv2; see `DenseProblem`."""

    model: ClassVar[type[DenseModel]] = NYUv2Model
    data: ClassVar[type[DenseDataModule]] = NYUv2DataModule


PROBLEMS = {
    "full": NYUv2Problem(
        title="NYUv2",
        tasks=tuple(NYUV2.tasks),
        epochs=200,
        evaluations=20,
        look_every=100,
        accelerator="auto",
        batch_size=2,
    )
}
"""Problems by name. Set `root` to the folder of the data."""
