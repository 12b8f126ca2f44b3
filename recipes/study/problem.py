"""What a study trains on, and how it is named."""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import lightning as L
import yaml
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

__all__ = ["Problem", "baseline_problem", "find_problem", "import_object"]


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


def find_problem(name: str) -> Problem:
    """The problem of a name.

    Args:
        name: `recipe:problem` for one of `PROBLEMS` in `recipes.<recipe>.problems`, such as `digits:narrow`, or
            `package.module:NAME` for a `Problem` of yours. Overrides of its fields follow behind commas, dotted for an
            entry of a mapping: `digits:narrow,width=8,loss_weights.right=0.1`.

    Raises:
        ValueError: If there is no such problem, or it has no such field.
    """
    address, *overrides = _split(name)
    recipe, _, key = address.partition(":")
    try:
        module = importlib.import_module(recipe if "." in recipe else f"recipes.{recipe}.problems")
    except ModuleNotFoundError as error:
        raise ValueError(f"`problem` {name!r}: there is no module {error.name!r}.") from error
    known = {
        **{attribute: value for attribute, value in vars(module).items() if isinstance(value, Problem)},
        **getattr(module, "PROBLEMS", {}),
    }
    if key not in known:
        raise ValueError(f"`problem` must be one of {[f'{recipe}:{name}' for name in known]}; got {name!r}.")
    return _override(known[key], overrides)


def baseline_problem(name: str) -> str:
    """The name of the problem that has the single-task baselines of a problem."""
    address, *overrides = _split(name)
    ignored = find_problem(name).multi_task_fields
    return ",".join([address, *(text for text in overrides if text.partition("=")[0].partition(".")[0] not in ignored)])


def import_object(address: str) -> Any:
    """What `package.module:NAME` names.

    Raises:
        ValueError: If there is no such thing.
    """
    module, _, name = address.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{address!r} must be the name of a module, a colon and a name in it: {error}.") from error


def _split(name: str) -> list[str]:
    """The parts between commas, but for those within brackets."""
    return re.split(r",(?![^\[{]*[\]}])", name)


def _override(problem: Problem, overrides: Sequence[str]) -> Problem:
    changes: dict[str, Any] = {}
    known = {field.name for field in fields(problem)}
    for override in overrides:
        path, equals, text = override.partition("=")
        field, _, entry = path.partition(".")
        if field not in known or not equals:
            raise ValueError(f"An override must be field=value with a field of {sorted(known)}; got {override!r}.")
        value = yaml.safe_load(text)
        changes[field] = {**changes.get(field, getattr(problem, field)), entry: value} if entry else value
    return replace(problem, **changes)
