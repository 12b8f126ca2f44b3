"""The task weights of Eq. 10."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_cost.objectives import balance_weights


def test_balance_weights_worked_by_hand() -> None:
    # Ratios 3 and 3/2; 6, 3 and 2.
    e = math.exp
    two = [2 * e(3) / (e(3) + e(1.5)), 2 * e(1.5) / (e(3) + e(1.5))]
    total = e(6) + e(3) + e(2)
    three = [3 * e(6) / total, 3 * e(3) / total, 3 * e(2) / total]
    assert_close(balance_weights(torch.tensor([1.0, 2.0]).double()), torch.tensor(two).double())
    assert_close(balance_weights(torch.tensor([1.0, 2.0, 3.0])), torch.tensor(three))
    assert torch.equal(balance_weights(torch.full((5,), 7.0)), torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("norms", "weights"),
    [
        ([1.0, 1e6], [2.0, 0.0]),
        ([1e6, 1.0, 1.0], [0.0, 1.5, 1.5]),
        ([0.0, 3.0, 3.0], [0.0, 1.0, 1.0]),
        ([0.0, 5.0, 0.0], [0.0, 1.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1e-30, 1e30], [2.0, 0.0]),
    ],
)
def test_balance_weights_do_not_overflow(norms: list[float], weights: list[float], dtype: torch.dtype) -> None:
    assert_close(balance_weights(torch.tensor(norms, dtype=dtype)), torch.tensor(weights, dtype=dtype))


@given(st.lists(st.floats(0, 1e30), min_size=2, max_size=6))
def test_balance_weights_sum_to_the_number_of_tasks_and_favor_small_gradients(norms: list[float]) -> None:
    weights = balance_weights(torch.tensor(norms, dtype=torch.float64))
    there = torch.tensor(norms, dtype=torch.float64) != 0
    assert_close(weights.sum().item(), float(there.sum()))
    assert not weights[~there].any()
    order = torch.tensor(norms, dtype=torch.float64)[there].argsort()
    assert (weights[there][order].diff() <= 0).all()
