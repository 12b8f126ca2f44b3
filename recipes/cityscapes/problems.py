"""What studies train on, on the data of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recipes.cityscapes import CITYSCAPES, CityScapesDataModule, CityScapesModel
from recipes.dense.data import DenseDataModule
from recipes.dense.model import DenseModel
from recipes.dense.problem import DenseProblem

__all__ = ["PROBLEMS", "CityScapesProblem"]


@dataclass(frozen=True, kw_only=True)
class CityScapesProblem(DenseProblem):
    """CityScapes; see `DenseProblem`."""

    model: ClassVar[type[DenseModel]] = CityScapesModel
    data: ClassVar[type[DenseDataModule]] = CityScapesDataModule


PROBLEMS = {
    "full": CityScapesProblem(
        title="CityScapes",
        tasks=tuple(CITYSCAPES.tasks),
        epochs=200,
        evaluations=20,
        look_every=100,
        accelerator="auto",
        batch_size=8,
    )
}
"""Problems by name. Set `root` to the folder of the data."""
