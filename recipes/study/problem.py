"""What a study trains on, and how it is named."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
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
    module = _module(recipe)
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


def _module(name: str) -> ModuleType:
    candidates = [f"recipes.{name}.problems"] * ("." not in name) + [name]
    for candidate in candidates:
        try:
            return importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            # What a module that is there misses is another matter.
            if error.name is None or not f"{candidate}.".startswith(f"{error.name}."):
                raise
    raise ValueError(f"A recipe or module must be one of {candidates}; there is none of them. Got {name!r}.")


def _split(name: str) -> list[str]:
    """The parts between commas, but for those within brackets."""
    parts, depth = [""], 0
    for character in name:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _override(problem: Problem, overrides: Sequence[str]) -> Problem:
    changes: dict[str, Any] = {}
    known = {field.name for field in fields(problem)}
    for override in overrides:
        path, equals, text = override.partition("=")
        field, _, entry = path.partition(".")
        if field not in known or not equals:
            raise ValueError(f"An override must be field=value with a field of {sorted(known)}; got {override!r}.")
        old = changes.get(field, getattr(problem, field))
        if entry and not isinstance(old, Mapping):
            raise ValueError(f"{field!r} has no entries; got {override!r}.")
        changes[field] = {**old, entry: _value(text, old.get(entry), path)} if entry else _value(text, old, path)
    return replace(problem, **changes)


def _value(text: str, old: Any, path: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(old, int | float) and not isinstance(old, bool):
        try:
            # YAML takes 1e-3 for a word.
            value = type(old)(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path!r} must be a number like {old!r}; got {text!r}.") from error
    return value
