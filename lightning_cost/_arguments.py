"""Checks of arguments. Each error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

__all__: list[str] = []


def describe(value: object) -> str:
    """A value for a message: the shape of a tensor, the type of what would be long."""
    if isinstance(value, Tensor) and value.ndim > 0:
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def check_integer(name: str, value: object, least: int | None = None) -> None:
    """Refuse what is not an integer, or less than ``least``.

    Raises:
        ValueError: If it is refused.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and int(value) < least):
        range_ = "" if least is None else f" of at least {least}"
        raise ValueError(f"`{name}` must be an integer{range_}; got {value!r}.")


def check_seed(name: str, value: object) -> None:
    """Refuse what does not seed a ``torch.Generator``.

    Raises:
        ValueError: If it is refused.
    """
    check_integer(name, value)
    assert isinstance(value, Integral)
    if not -(2**63) <= int(value) < 2**64:
        raise ValueError(f"`{name}` must be an integer from -2**63 to 2**64 - 1; got {value!r}.")


def check_share(name: str, value: float, low: float) -> None:
    """Refuse what is not in ``(low, 1]``.

    Raises:
        ValueError: If it is refused.
    """
    if not (_is_number(value) and low < value <= 1):
        raise ValueError(f"`{name}` must be in ({low:g}, 1]; got {value!r}.")


def as_bool(name: str, value: object) -> bool:
    """What a function of the user has decided: a bool, one of NumPy, or a tensor with one.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(value, Tensor) and value.dtype == torch.bool and value.numel() == 1:
        return bool(value)
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    several = isinstance(value, Tensor) and value.numel() > 1
    advice = " Reduce it, for example by `.any()`." if several else ""
    raise TypeError(f"`{name}` must return True or False; got {describe(value)}.{advice}")


def as_number(name: str, value: object) -> float | None:
    """A number that a function of the user has returned, also as a tensor with one element; or ``None``.

    Raises:
        TypeError: If it is something else.
    """
    if value is None:
        return None
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach())
    if not _is_number(value):
        raise TypeError(f"`{name}` must return a number or None; got {describe(value)}.")
    assert isinstance(value, Real)
    return float(value)


def check_shape(name: str, value: object, shape: Sequence[int], what: str) -> None:
    """Refuse what is no tensor of a shape.

    Args:
        name: The argument.
        value: Its value.
        shape: The shape.
        what: What the shape is, for the message, such as ``"one element per shared parameter"``.

    Raises:
        ValueError: If it is refused.
    """
    if not isinstance(value, Tensor) or value.shape != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, {what}; got {describe(value)}.")


def check_same_shape(name: str, value: Tensor, other: str, reference: Tensor) -> None:
    """Refuse a tensor that has not the shape of another one.

    Raises:
        ValueError: If it is refused.
    """
    if value.shape != reference.shape:
        raise ValueError(f"`{name}` must have the shape of `{other}`, {tuple(reference.shape)}; got {describe(value)}.")


def check_positive(name: str, value: float) -> float:
    """Refuse what is not a positive and finite number.

    Raises:
        ValueError: If it is refused.
    """
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(f"`{name}` must be a positive number; got {value!r}.")
    return value


def check_not_negative(name: str, value: float) -> None:
    """Refuse what is not a finite number of at least 0.

    Raises:
        ValueError: If it is refused.
    """
    if not (_is_number(value) and 0 <= value < math.inf):
        raise ValueError(f"`{name}` must be a number of at least 0; got {value!r}.")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Refuse what is not strictly between two numbers.

    Raises:
        ValueError: If it is refused.
    """
    if not (_is_number(value) and low < value < high):
        raise ValueError(f"`{name}` must be between {low:g} and {high:g}; got {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_choice(name: str, value: object, choices: Iterable[object], alternative: str = "") -> None:
    """Refuse what is none of the choices.

    Args:
        name: The argument.
        value: Its value.
        choices: What is allowed.
        alternative: What else is allowed, for the message.

    Raises:
        ValueError: If it is refused.
    """
    allowed = list(choices)
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"`{name}` must be one of {allowed}{alternative and f' or {alternative}'}; got {value!r}.")


def check_among(name: str, value: object, what: str, known: Sequence[object]) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: If it is refused.
    """
    if value not in known:
        raise ValueError(f"`{name}` must be among {what} {list(known)}; got {value!r}.")


def check_bool(name: str, value: object) -> None:
    """Refuse what is neither ``True`` nor ``False``.

    Raises:
        ValueError: If it is refused.
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False; got {value!r}.")


def check_targets(name: str, value: object) -> None:
    """Refuse what does not choose modules as PEFT's ``target_modules`` does.

    Raises:
        ValueError: If it is neither a list of names, nor a regular expression, nor ``None``.
    """
    allowed = f"`{name}` must be a list of names, a regular expression, or None for all; got {value!r}"
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{allowed}, which is no regular expression: {error}.") from error
    names = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if value is not None and (not names or not all(isinstance(entry, str) and entry for entry in names)):
        raise ValueError(f"{allowed}.")


def check_effect(name: str, value: object, default: object, without: str) -> None:
    """Refuse an argument that was set but has no effect.

    Args:
        name: The argument.
        value: Its value.
        default: Its default, which is not refused.
        without: Why it has no effect, such as ``"with full_rank=True"``.

    Raises:
        ValueError: If it is refused.
    """
    if value != default:
        raise ValueError(f"`{name}={value!r}` has no effect {without}. Remove one of the two.")
