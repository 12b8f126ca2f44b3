"""Which losses are held: Eq. 7, the drift, and the level set to first and second order."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lightning_cost.invariance import (
    Invariance,
    LevelSet,
    _pseudo_inverse_of_correlation,
    drift,
    loss_fluctuation,
    loss_fluctuation_weights,
)
from tests.support.problems import flat_parameters, gradients_of, jacobian, loss_function, mlp_batch, mlp_problem, rows

RANDOM = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


VECTOR = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LOSSES = torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64)


REFERENCE = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("relative", "invariance", "value", "weights"),
    [
        (False, "per_task", 4 / 3, [1 / 3, -1 / 3, 1 / 3]),
        (True, "per_task", 2 / 3, [1 / 6, -1 / 6, 1 / 6]),
        (False, "mean", 2 / 3, [1 / 3, 1 / 3, 1 / 3]),
        (True, "mean", 1 / 3, [1 / 6, 1 / 6, 1 / 6]),
    ],
)
def test_loss_fluctuation_worked_by_hand(
    relative: bool, invariance: Invariance, value: float, weights: list[float]
) -> None:
    assert_close(loss_fluctuation(LOSSES, REFERENCE, invariance, relative=relative).item(), value)
    found = loss_fluctuation_weights(LOSSES, REFERENCE, invariance, relative=relative)
    assert_close(found, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("invariance", ["per_task", "mean"])
def test_weights_of_the_fluctuation_are_its_derivative(relative: bool, invariance: Invariance) -> None:
    losses = torch.tensor([1.3, -0.4, 7.0, 2.0], dtype=torch.float64)
    reference = torch.tensor([1.0, -0.5, 9.0, 2.5], dtype=torch.float64)
    with torch.no_grad():
        weights = loss_fluctuation_weights(losses, reference, invariance, relative=relative)
    for i, unit in enumerate(torch.eye(4, dtype=torch.float64)):
        values = [
            loss_fluctuation(losses + step * unit, reference, invariance, relative=relative) for step in (1e-6, -1e-6)
        ]
        assert_close((values[0] - values[1]) / 2e-6, weights[i], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("invariance", ["per_task", "mean"])
def test_fluctuation_is_zero_and_flat_where_it_starts(relative: bool, invariance: Invariance) -> None:
    reference = torch.tensor([0.0, 2.0, -1.0])
    assert loss_fluctuation(reference, reference, invariance, relative=relative) == 0
    assert not loss_fluctuation_weights(reference, reference, invariance, relative=relative).any()


def test_losses_that_differ_by_rounding_push_nowhere() -> None:
    before = torch.tensor([0.3, 1.0, 20.0])
    again = before * (1 + torch.tensor([1.0, 0.0, -1.0]) * torch.finfo(torch.float32).eps)
    assert not torch.equal(again, before)
    weights = partial(loss_fluctuation_weights, reference=before, invariance="per_task", relative=True)
    assert torch.equal(weights(again), torch.zeros(3))
    torch.testing.assert_close(
        weights(before * torch.tensor([1.0001, 0.9999, 1.0])) * before * 3, torch.tensor([1.0, -1.0, 0.0])
    )


@pytest.mark.parametrize(
    ("losses", "reference", "per_task", "mean"),
    [
        ([1.1, 2.0], [1.0, 2.0], 0.1, 0.1 / 3),
        ([1.1, 1.9], [1.0, 2.0], 0.1, 0.0),
        ([-1.5, 2.0], [-1.0, 2.0], 0.5, 0.5),
        ([0.0, 1.0], [0.0, 1.0], 0.0, 0.0),
        ([0.1, 1.0], [0.0, 1.0], math.inf, 0.1),
        ([math.inf, 1.0], [1.0, 1.0], math.inf, math.inf),
        ([math.nan, 1.0], [1.0, 1.0], math.nan, math.nan),
    ],
)
def test_drift_worked_by_hand(losses: list[float], reference: list[float], per_task: float, mean: float) -> None:
    tensors = torch.tensor(losses, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    assert drift(*tensors, "per_task") == pytest.approx(per_task, abs=1e-15, nan_ok=True)
    assert drift(*tensors, "mean") == pytest.approx(mean, abs=1e-15, nan_ok=True)


def directional_derivatives(matrix: Tensor, step: Tensor) -> Tensor:
    """Relative to what a step straight up each task gradient would give."""
    return (matrix @ step) / (matrix.norm(dim=1) * step.norm()).clamp_min(1e-300)


@pytest.mark.parametrize(
    "scales",
    [[1.0, 1.0, 1.0], [1.0, 1e6, 1e-6], [1e-12, 1.0, 1.0]],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_held_loss_moves_along_the_tangent(scales: list[float], dtype: torch.dtype) -> None:
    matrix = (RANDOM * torch.tensor(scales, dtype=torch.float64)[:, None]).to(dtype)
    tangent = LevelSet(gradients_of(matrix), "per_task").tangent(VECTOR.to(dtype))
    assert tangent.dtype == dtype
    assert directional_derivatives(matrix, tangent).abs().max() < 100 * torch.finfo(dtype).eps
    orthonormal = torch.linalg.qr(RANDOM.T)[0]
    expected = VECTOR - orthonormal @ (orthonormal.T @ VECTOR)
    assert_close(tangent.double(), expected, rtol=0, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0], [1.0, 1e6, 1e-6]])
def test_retraction_is_the_smallest_step_that_undoes_the_residuals(scales: list[float]) -> None:
    matrix = RANDOM * torch.tensor(scales, dtype=torch.float64)[:, None]
    residuals = torch.tensor([0.3, -2.0, 0.01], dtype=torch.float64) * torch.tensor(scales, dtype=torch.float64)
    step = LevelSet(gradients_of(matrix), "per_task").retraction(residuals)
    assert_close(matrix @ step, -residuals, rtol=1e-9, atol=0)
    orthonormal = torch.linalg.qr(RANDOM.T)[0]
    assert_close(orthonormal @ (orthonormal.T @ step), step, rtol=1e-9, atol=1e-12 * float(step.norm()))


def test_holding_the_mean_leaves_every_other_direction() -> None:
    level_set, mean = LevelSet(gradients_of(RANDOM), "mean"), RANDOM.mean(dim=0)
    tangent = level_set.tangent(VECTOR)
    assert_close(tangent, VECTOR - mean * (mean @ VECTOR) / (mean @ mean), rtol=1e-10, atol=1e-12)
    assert (RANDOM @ tangent).abs().min() > 0.1
    residuals = torch.tensor([0.5, -0.1, 0.2], dtype=torch.float64)
    assert_close(level_set.retraction(residuals), -0.2 * mean / (mean @ mean), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "residuals", "undone"),
    [
        # Twice the same task, the same direction at another scale, the opposite one.
        (RANDOM[[0, 0, 1]], [0.2, 0.2, -1.0], [0.2, 0.2, -1.0]),
        (RANDOM[[0, 0, 1]] * torch.tensor([[1.0], [1e3], [1.0]]), [0.2, 200.0, -1.0], [0.2, 200.0, -1.0]),
        (RANDOM[[0, 0, 1]] * torch.tensor([[1.0], [-1.0], [1.0]]), [0.2, -0.2, -1.0], [0.2, -0.2, -1.0]),
        # Residuals that no step can undo are undone on average.
        (RANDOM[[0, 0, 1]], [0.2, 0.4, -1.0], [0.3, 0.3, -1.0]),
        # A task without gradient can neither be moved nor be in the way.
        (RANDOM * torch.tensor([[1.0], [0.0], [1.0]]), [0.2, 5.0, -1.0], [0.2, 0.0, -1.0]),
        (torch.zeros(3, 40, dtype=torch.float64), [0.2, 5.0, -1.0], [0.0, 0.0, 0.0]),
    ],
)
def test_degenerate_task_gradients(matrix: Tensor, residuals: list[float], undone: list[float]) -> None:
    level_set = LevelSet(gradients_of(matrix), "per_task")
    tangent = level_set.tangent(VECTOR)
    assert directional_derivatives(matrix, tangent).abs().max() < 1e-12
    # Nothing is taken away but the span of the rows.
    span = torch.linalg.svd(matrix, full_matrices=False)
    basis = span.Vh[span.S.gt(1e-9 * span.S.max())]
    assert_close(tangent, VECTOR - basis.T @ (basis @ VECTOR), rtol=1e-8, atol=1e-10)
    step = level_set.retraction(torch.tensor(residuals, dtype=torch.float64))
    assert_close(matrix @ step, -torch.tensor(undone, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**31),
    st.integers(2, 6),
    st.lists(st.floats(-6, 6), min_size=6, max_size=6),
    st.sampled_from(["per_task", "mean"]),
)
def test_tangents_change_no_held_loss_of_any_tasks(
    seed: int, num_tasks: int, exponents: list[float], invariance: Invariance
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.tensor(exponents[:num_tasks], dtype=torch.float64)
    matrix = scales[:, None] * torch.randn(num_tasks, 12, generator=generator, dtype=torch.float64)
    vector = torch.randn(12, generator=generator, dtype=torch.float64)
    level_set = LevelSet(gradients_of(matrix), invariance)
    tangent = level_set.tangent(vector)
    held = matrix if invariance == "per_task" else matrix.mean(dim=0, keepdim=True)
    assert (held @ tangent).abs().le(1e-9 * held.norm(dim=1) * vector.norm()).all()
    assert_close(level_set.tangent(tangent), tangent, rtol=1e-6, atol=1e-9)


def test_task_gradients_may_be_given_number_by_number() -> None:
    # Holding x and x + y leaves nothing of the plane; holding their mean (x + y / 2) leaves (1, -2).
    gradients, vector = rows([1, 0], [1, 1]), torch.tensor([5.0, 5.0], dtype=torch.float64)
    assert_close(LevelSet(gradients, "per_task").tangent(vector), torch.zeros(2, dtype=torch.float64))
    assert_close(LevelSet(gradients, "mean").tangent(vector), torch.tensor([-1.0, 2.0], dtype=torch.float64))


def test_losses_leave_the_level_set_to_second_order_and_return_to_third_order() -> None:
    module = mlp_problem()
    losses, position = loss_function(module, mlp_batch()), flat_parameters(module)
    matrix = jacobian(losses, position).detach()
    level_set, before = LevelSet(gradients_of(matrix), "per_task"), losses(position).detach()
    direction = torch.randn(len(position), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tangent = level_set.tangent(direction)
    left, returned = [], []
    for size in (1e-2, 5e-3):
        residuals = losses(position + size * tangent).detach() - before
        left.append(residuals.norm())
        arrived = position + size * tangent + level_set.retraction(residuals)
        returned.append((losses(arrived).detach() - before).norm())
    assert returned[0] < 0.1 * left[0]
    assert_close(left[0] / left[1], torch.tensor(4.0, dtype=torch.float64), rtol=0.1, atol=0)
    assert_close(returned[0] / returned[1], torch.tensor(8.0, dtype=torch.float64), rtol=0.15, atol=0)


@pytest.mark.parametrize("correlation", [0.0, 0.3, -0.9, 1.0, -1.0, 1.0 - 1e-7, -1.0 + 1e-7, 1.0 - 1e-4])
def test_two_rows_have_the_pseudo_inverse_of_any_matrix(correlation: float) -> None:
    matrix = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    expected = torch.linalg.pinv(matrix, rtol=1e-6, hermitian=True)
    torch.testing.assert_close(_pseudo_inverse_of_correlation(correlation), expected, rtol=1e-6, atol=1e-9)
