"""The states of the random number generators, captured and restored."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import torch

from lightning_cost._lightning.rng import RngState, preserved_rng


def draw() -> tuple[float, float, float]:
    """One number from each global generator."""
    return float(torch.rand(())), float(np.random.random()), random.random()  # noqa: NPY002


def test_restored_generators_draw_the_same_again() -> None:
    state = RngState.capture()
    first, second = draw(), draw()
    assert all(one != two for one, two in zip(first, second, strict=True))
    for _ in range(2):
        state.restore()
        assert (draw(), draw()) == (first, second)


def test_generators_are_restored_after_a_block_also_after_one_that_fails() -> None:
    state = RngState.capture()
    expected = draw()
    state.restore()
    with preserved_rng():
        assert draw() == expected
    with suppress(ArithmeticError), preserved_rng():
        assert draw() == expected
        raise ArithmeticError
    assert draw() == expected
