"""Problems by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import yaml

from recipes.common.problem import Problem

__all__ = ["baseline_problem", "find_problem", "import_object"]


def find_problem(name: str) -> Problem:
    """Look up a problem.

    Args:
        name: `recipe:problem` for one of `PROBLEMS` in `recipes.<recipe>.problems`, such as `digits:narrow`, or
            `package.module:NAME` for a `Problem` of yours. You can change its fields after commas, and single entries
            of a mapping after a dot: `digits:narrow,width=8,loss_weights.right=0.1`.

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
    """Name of the problem whose single-task runs are the baselines of a problem."""
    address, *overrides = _split(name)
    ignored = find_problem(name).multi_task_fields
    return ",".join([address, *(text for text in overrides if text.partition("=")[0].partition(".")[0] not in ignored)])


def import_object(address: str) -> Any:
    """Import `package.module:NAME`. If there is no such object, this is a ValueError."""
    module, _, name = address.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{address!r} must be a module, a colon and a name in that module: {error}.") from error


def _module(name: str) -> ModuleType:
    candidates = [f"recipes.{name}.problems"] * ("." not in name) + [name]
    for candidate in candidates:
        try:
            return importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            # If the module exists and one of its own imports is missing, the user must see that.
            if error.name is None or not f"{candidate}.".startswith(f"{error.name}."):
                raise
    raise ValueError(f"A recipe or module must be one of {candidates}; there is none of them. Got {name!r}.")


def _split(name: str) -> list[str]:
    """Split at the commas outside brackets."""
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
            # YAML reads 1e-3 as a string.
            value = type(old)(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path!r} must be a number like {old!r}; got {text!r}.") from error
    return value
