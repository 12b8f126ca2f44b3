"""Checks of arguments. Each error names the argument, its value and what is allowed."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

__all__: list[str] = []


def describe(value: object) -> str:
    """A value for a message: the shape of a tensor, the type of what would be long."""
    if isinstance(value, Tensor) and value.ndim > 0:
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def check_instance(name: str, value: object, kind: Any, what: str) -> None:
    """Refuse what is no object of a class.

    Args:
        name: The argument.
        value: Its value.
        kind: The class, or several, as ``isinstance`` takes them.
        what: What it must be, for the message.

    Raises:
        TypeError: If it is refused.
    """
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be {what}; got {describe(value)}.")


def check_floating(name: str, value: object) -> None:
    """Refuse what is no tensor of real floating-point numbers.

    Raises:
        TypeError: If it is refused.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else describe(value)
        raise TypeError(f"`{name}` must be a tensor of floating-point numbers; got {kind}.")


def check_kind(name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a tensor of another type, on another device, or that is sparse.

    Raises:
        TypeError: If it is refused.
    """
    if (value.dtype, value.device, value.layout) != (dtype, device, torch.strided):
        raise TypeError(
            f"`{name}` must be a dense tensor of {dtype} on {device}; got {value.layout}, {value.dtype} on"
            f" {value.device}. Convert it."
        )


def as_list(name: str, values: object, what: str) -> list[Any]:
    """The entries of a sequence or of another iterable, but not those of a tensor or a string.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(values, (str, Tensor, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"`{name}` must be a sequence of {what}; got {describe(values)}.")
    return list(values)


def as_functions(name: str, values: object, example: str) -> list[Any]:
    """Functions, at least one, from any iterable of them.

    Raises:
        TypeError: If there is something else.
        ValueError: If there is none.
    """
    functions = as_list(name, values, "functions")
    for function in functions:
        if not callable(function):
            raise TypeError(f"`{name}` must hold functions; got {describe(function)}. Pass `{example}`.")
    if not functions:
        raise ValueError(f"`{name}` must hold at least one function; got none.")
    return functions


def as_parameters(name: str, values: object) -> list[Parameter]:
    """Parameters, from any iterable of them.

    Raises:
        TypeError: If it is something else.
    """
    parameters = as_list(name, values, "objects of torch.nn.Parameter")
    for parameter in parameters:
        if not isinstance(parameter, Parameter):
            raise TypeError(f"`{name}` must hold objects of torch.nn.Parameter; got {describe(parameter)}.")
    return parameters


def as_shared(name: str, values: object) -> list[Parameter]:
    """Parameters that can be moved: at least one, each once, of floating-point numbers, with a gradient.

    Raises:
        TypeError: If there are no parameters of this kind.
        ValueError: If there is none, one is there twice, or one is frozen.
    """
    parameters = as_parameters(name, values)
    if not parameters or len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError(f"`{name}` must hold at least one parameter, and each once; got {len(parameters)}.")
    for parameter in parameters:
        check_floating(name, parameter)
    if not all(parameter.requires_grad for parameter in parameters):
        raise ValueError(f"`{name}` must hold parameters that require a gradient; got a frozen one.")
    return parameters


def check_each(name: str, tensors: Sequence[Tensor | None], parameters: Sequence[Parameter]) -> None:
    """Refuse what is not a tensor or ``None`` for each parameter, in its shape.

    Raises:
        ValueError: If it is refused.
    """
    if len(tensors) != len(parameters):
        raise ValueError(f"`{name}` must hold one tensor for each of {len(parameters)} parameters; got {len(tensors)}.")
    for index, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
        if tensor is not None and getattr(tensor, "shape", None) != parameter.shape:
            shape = tuple(parameter.shape)
            raise ValueError(f"`{name}[{index}]` must have shape {shape} or be None; got {describe(tensor)}.")


def as_names(name: str, values: object) -> tuple[str, ...]:
    """Names of tasks, each once.

    Raises:
        TypeError: If they are no sequence of strings.
        ValueError: If a name is there twice.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"`{name}` must be a sequence of task names; got {describe(values)}.")
    names = tuple(values)
    for entry in names:
        check_instance(name, entry, str, "a sequence of task names, which are strings")
    if len(set(names)) < len(names):
        raise ValueError(f"`{name}` must name each task once; got {list(names)}.")
    return names


def check_function(name: str, value: object, what: str) -> None:
    """Refuse a class, and a function that does not take a single argument. Other objects pass.

    Raises:
        ValueError: If it is refused.
    """
    if isinstance(value, type):
        raise ValueError(f"`{name}` must be {what}, not a class; got {value!r}.")
    if callable(value):
        try:
            signature = inspect.signature(value)
        except ValueError:
            return  # Some functions written in C do not say what they take.
        try:
            signature.bind(None)
        except TypeError as error:
            raise ValueError(
                f"`{name}` must be {what}, with one argument; got {describe(value)}{signature}."
            ) from error


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
    """Refuse what is no tensor of floating-point numbers of a shape.

    Args:
        name: The argument.
        value: Its value.
        shape: The shape.
        what: What the shape is, for the message, such as ``"one element per shared parameter"``.

    Raises:
        TypeError: If it holds anything but floating-point numbers.
        ValueError: If it has another shape.
    """
    if not isinstance(value, Tensor) or value.shape != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, {what}; got {describe(value)}.")
    check_floating(name, value)


def check_same_shape(name: str, value: Tensor, other: str, reference: Tensor) -> None:
    """Refuse tensors of different shapes, or of anything but floating-point numbers.

    Raises:
        TypeError: If they do not hold floating-point numbers.
        ValueError: If their shapes differ.
    """
    check_floating(other, reference)
    check_floating(name, value)
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


def check_number(name: str, value: object) -> None:
    """Refuse what is not a number.

    Raises:
        TypeError: If it is refused.
    """
    if not _is_number(value):
        raise TypeError(f"`{name}` must be a number; got {describe(value)}.")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Refuse what is not strictly between two numbers.

    Raises:
        ValueError: If it is refused.
    """
    if not (_is_number(value) and low < value < high):
        raise ValueError(f"`{name}` must be between {low:g} and {high:g}; got {value!r}.")


def check_within(name: str, value: float, low: float, high: float) -> None:
    """Refuse what is not between two numbers; they themselves are allowed.

    Raises:
        ValueError: If it is refused.
    """
    if not (_is_number(value) and low <= value <= high):
        raise ValueError(f"`{name}` must be from {low:g} to {high:g}; got {value!r}.")


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
        raise ValueError(
            f"`{name}` must be one of {allowed}{alternative and f' or {alternative}'}; got {describe(value)}."
        )


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
