"""A method that works on some of its tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchjd.aggregation import ExcessMTL, GradVac, NashMTL, UPGrad
from torchjd.scalarization import UW, Constant

from lightning_cost._training.method_state import state_of
from lightning_cost._training.narrowed import narrowed
from tests.support.teleporting import assert_same


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(seed))


def test_all_tasks_change_nothing() -> None:
    method = GradVac()
    method(rows(3))
    before = state_of(method)
    with narrowed(method, [0, 1, 2], 3):
        assert_same(state_of(method), before)


def test_an_option_of_each_task_is_narrowed() -> None:
    weights = torch.tensor([1.0, 2.0, 4.0])
    method = Constant(weights)
    with narrowed(method, [0, 2], 3):
        assert float(method(torch.tensor([10.0, 100.0]))) == 410.0
    assert method.weights is weights
    upgrad = UPGrad(pref_vector=weights)
    with narrowed(upgrad, [1], 3):
        torch.testing.assert_close(upgrad(rows(1)), 2 * rows(1)[0])
    assert upgrad(rows(3)).shape == (7,)


def test_a_parameter_of_each_task_gets_its_gradient() -> None:
    method = UW(3)
    parameter = method.log_var
    with narrowed(method, [2, 0], 3):
        method(torch.tensor([1.0, 3.0])).backward()
    assert method.log_var is parameter
    assert parameter.grad.tolist() == [-1.0, 0.0, 0.0]


@pytest.mark.parametrize("make", [GradVac, ExcessMTL, lambda: NashMTL(3)], ids=["GradVac", "ExcessMTL", "Nash-MTL"])
def test_memory_is_that_of_the_kept_tasks_and_comes_back_with_the_others(make: Any) -> None:
    method, alone = make(), make()
    for step in range(2):
        torch.manual_seed(step)
        method(rows(3, step))
    before = state_of(method)
    with narrowed(method, [0, 2], 3):
        torch.manual_seed(7)
        narrow = method(rows(2, seed=9))
    torch.manual_seed(3)
    after = method(rows(3, seed=5))
    assert bool(torch.isfinite(torch.cat([narrow, after])).all())
    assert state_of(method).keys() == before.keys()
    assert bool(torch.isfinite(alone(rows(3))).all())


def test_a_memory_that_is_not_there_yet_begins_with_all_tasks() -> None:
    method = GradVac()
    with narrowed(method, [0, 1], 3):
        method(rows(2))
    assert method.gramian_weighting._phi_t is None
    method(rows(3))
    assert method.gramian_weighting._phi_t.shape == (3, 3)


def test_an_error_leaves_the_method_as_it_was() -> None:
    method = NashMTL(3)
    method(rows(3))
    memory = method.weighting.prvs_alpha.copy()
    with pytest.raises(ArithmeticError), narrowed(method, [0, 1], 3):
        raise ArithmeticError
    assert method.n_tasks == 3
    assert np.array_equal(method.weighting.prvs_alpha, memory)
