"""Checks of arguments: what each accepts, and what it refuses by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn

from lightning_cost._arguments import (
    as_functions,
    as_names,
    as_shared,
    check_between,
    check_bool,
    check_choice,
    check_effect,
    check_function,
    check_integer,
    check_not_negative,
    check_positive,
    check_targets,
    check_within,
)

POSITIVE, NOT_NEGATIVE = "must be a positive number; got {}.", "a number of at least 0; got {}."
BETWEEN = "be between 0 and 0.5; got {}."


@pytest.mark.parametrize(
    ("check", "values"),
    [
        (lambda value: check_integer("n", value), [-3, 0, 7]),
        (lambda value: check_integer("n", value, 2), [2, 3]),
        (lambda value: check_positive("n", value), [1e-300, 1, 1e300]),
        (lambda value: check_not_negative("n", value), [0, 0.0, 1e300]),
        (lambda value: check_between("n", value, 0, 1), [1e-9, 0.5, 1 - 1e-9]),
        (lambda value: check_within("n", value, 0, 1), [0, 0.5, 1]),
        # `max` does not say what it takes, and a partial function and a method are functions as well.
        (lambda value: check_function("n", value, "f"), [len, max, partial(max, 1), "a".join, lambda *a: a, "name"]),
        (lambda value: check_choice("n", value, ["mean", None, 1]), ["mean", None, 1]),
        (lambda value: check_effect("n", value, 0.4, "with `m=0`"), [0.4]),
    ],
)
def test_what_is_allowed_is_accepted(check: Callable[[Any], object], values: list[Any]) -> None:
    for value in values:
        check(value)


@pytest.mark.parametrize(
    ("check", "values", "message"),
    [
        (lambda value: check_integer("n", value), [1.0, "1", None, True], "`n` must be an integer; got {}."),
        (lambda value: check_integer("n", value, 2), [1, -2, 2.0], "`n` must be an integer of at least 2; got {}."),
        (
            lambda value: check_positive("n", value),
            [0, -1.0, math.inf, math.nan, "1", None, True],
            POSITIVE,
        ),
        (
            lambda value: check_not_negative("n", value),
            [-1e-9, math.inf, math.nan, "1", True],
            NOT_NEGATIVE,
        ),
        (
            lambda value: check_between("n", value, 0, 0.5),
            [0, 0.5, -1, math.nan, "0.1"],
            BETWEEN,
        ),
        (
            lambda value: check_within("n", value, 0, 1),
            [-1e-9, 2, math.nan, True, "1"],
            "`n` must be from 0 to 1; got {}.",
        ),
        # A value equals a choice only if it also has its type.
        (lambda value: check_choice("n", value, ["a", 1]), ["b", None, True, 1.0], "one of ['a', 1]; got {}."),
        (lambda value: check_choice("n", value, ["a"], "a list"), ["b"], "one of ['a'] or a list; got {}."),
        (lambda value: check_effect("n", value, 0.4, "with `m=0`"), [0.5, None], "`n={}` has no effect with `m=0`."),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(
    check: Callable[[Any], object], values: list[Any], message: str
) -> None:
    for value in values:
        with pytest.raises(ValueError, match=re.escape(message.format(repr(value)))) as caught:
            check(value)
        assert str(caught.value).startswith("`n")


def test_a_positive_number_is_returned() -> None:
    assert check_positive("n", 0.25) == 0.25


@pytest.mark.parametrize("value", [None, ["0"], ("a", "b.c"), {"0"}, r".*\.2", "all-linear"], ids=repr)
def test_targets_are_lists_of_names_or_a_regular_expression(value: Any) -> None:
    check_targets("targets", value)


@pytest.mark.parametrize("value", [[], set(), "", [1], [""], 5, True, re.compile("a"), "["], ids=repr)
def test_other_targets_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`targets` must be a list of names, a regular expression, or None"):
        check_targets("targets", value)


@pytest.mark.parametrize("value", ["False", 1, None])
def test_a_bool_is_a_bool(value: Any) -> None:
    check_bool("flag", True)
    with pytest.raises(ValueError, match="`flag` must be True or False"):
        check_bool("flag", value)


def test_names_functions_and_parameters_may_come_from_any_iterable() -> None:
    parameters = nn.Linear(2, 2).parameters()
    assert as_names("names", (name for name in "ab")) == ("a", "b")
    assert as_functions("batches", iter([len]), "f") == [len]
    assert len(as_shared("shared", parameters)) == 2
