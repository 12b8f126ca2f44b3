"""Problems for studies and for the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

from recipes.common.looks import is_looked_at
from recipes.common.problem import Problem
from recipes.digits.data import DigitsDataModule
from recipes.digits.model import DigitsModel
from recipes.digits.tasks import TASKS

__all__ = ["PROBLEMS", "DigitsProblem"]


class _RarelyLoggedModel(DigitsModel):
    """Logs the training losses only in the steps that a study looks at. Logging takes a fifth of a step this small."""

    log_every = 1

    def log_dict(self, *args: object, **kwargs: object) -> None:
        if is_looked_at(self.trainer.global_step, self.log_every):
            super().log_dict(*args, **kwargs)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class DigitsProblem(Problem):
    """Some tasks of overlaid digits. The fields are arguments of `DigitsModel` and `DigitsDataModule`."""

    multi_task_fields: ClassVar[frozenset[str]] = frozenset({"loss_weights"})

    width: int
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 64
    num_train: int = 4000
    lr_milestones: Sequence[int] = ()

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """The metrics of the tasks."""
        return {f"{name}_{TASKS[name].metric}": TASKS[name].metric == "accuracy" for name in self.tasks}

    def make_model(self, tasks: Sequence[str], method: Aggregator | Scalarizer | None) -> DigitsModel:
        """A fresh model. The loss of a single-task baseline has no factor."""
        weights = self.loss_weights if len(tasks) > 1 else None
        model = _RarelyLoggedModel(tasks, self.width, weights, method, lr_milestones=self.lr_milestones)
        model.log_every = self.look_every
        return model

    def make_data(self, tasks: Sequence[str], seed: int) -> DigitsDataModule:
        """The same pairs for every seed, in another order."""
        return DigitsDataModule(self.batch_size, tasks=tasks, num_train=self.num_train, shuffle_seed=seed)


_NARROW = DigitsProblem(
    title="narrow, imbalanced",
    tasks=("left", "right"),
    epochs=12,
    width=16,
    loss_weights={"left": 1.0, "right": 0.03},
)

PROBLEMS = {
    "narrow": _NARROW,
    "balanced": DigitsProblem(title="balanced", tasks=("left", "right", "ink"), epochs=12, width=64),
    "many": DigitsProblem(title="many tasks", tasks=tuple(TASKS), epochs=12, width=16),
    "drops": replace(_NARROW, title="narrow, learning rate drops", lr_milestones=(6, 9)),
}
