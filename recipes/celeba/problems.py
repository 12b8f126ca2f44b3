"""What studies train on, on the data of the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

from recipes.celeba import CelebADataModule, CelebAModel
from recipes.celeba.attributes import ATTRIBUTES
from recipes.celeba.bars import AttributeBars
from recipes.common.problem import Problem, checked_root

__all__ = ["PROBLEMS", "CelebAProblem"]


@dataclass(frozen=True, kw_only=True)
class CelebAProblem(Problem):
    """Attributes of faces. The fields are arguments of `CelebAModel` and `CelebADataModule`."""

    root: str = ""
    width: int = 64
    lr: float = 3e-4
    batch_size: int = 256
    image_size: int = 64

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """The F1 of each attribute."""
        return {f"{name}_f1": True for name in self.tasks}

    def make_model(self, tasks: Sequence[str], method: Aggregator | Scalarizer | None) -> CelebAModel:
        """A fresh model."""
        return CelebAModel(tasks, self.width, method, self.lr)

    def make_data(self, tasks: Sequence[str], seed: int) -> CelebADataModule:
        """The same faces for every seed, in another order."""
        return CelebADataModule(checked_root(self.root), self.batch_size, self.image_size, shuffle_seed=seed)

    def make_callbacks(self, folder: Path) -> list[Callback]:
        """Draw the F1 of each attribute."""
        return [AttributeBars(folder)]


PROBLEMS = {
    "full": CelebAProblem(
        title="CelebA", tasks=ATTRIBUTES, epochs=15, evaluations=15, look_every=100, accelerator="auto"
    )
}
"""Problems by name. Set `root` to the folder of the data."""
