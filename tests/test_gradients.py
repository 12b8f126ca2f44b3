"""The figures of a matrix of task gradients, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cost import TaskGradients


@st.composite
def matrices(draw: Any) -> Any:
    """Rows of very different lengths, some of them zero."""
    num_tasks, num_parameters = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponents = draw(st.lists(st.integers(-6, 6), min_size=num_tasks, max_size=num_tasks))
    present = draw(st.lists(st.booleans(), min_size=num_tasks, max_size=num_tasks))
    matrix = generator.standard_normal((num_tasks, num_parameters))
    return (matrix * 10.0 ** np.array(exponents)[:, None] * np.array(present)[:, None]).astype(np.float32)


def safe_ratio(numerator: Any, denominator: Any) -> Any:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


@given(matrices())
@settings(deadline=None)
def test_figures_equal_those_of_numpy_in_float64(matrix: np.ndarray) -> None:
    gradients = TaskGradients([f"task{i}" for i in range(len(matrix))], torch.from_numpy(matrix))
    rows = matrix.astype(np.float64)
    mean, norms = rows.mean(axis=0), np.linalg.norm(rows, axis=1)
    products, lengths = rows @ rows.T, np.outer(norms, norms)
    # float32 knows each element of the mean up to its rounding of the longest row.
    rounding = 1e-6 * norms.max()

    assert (np.abs(gradients.gramian.numpy() - products) <= 1e-5 * lengths).all()
    np.testing.assert_allclose(gradients.norms, norms, rtol=1e-5)
    np.testing.assert_allclose(gradients.mean, mean, rtol=0, atol=rounding)
    np.testing.assert_allclose(gradients.mean_norm, np.linalg.norm(mean), rtol=1e-5, atol=rounding)
    np.testing.assert_allclose(gradients.pairwise_cosines, safe_ratio(products, lengths), rtol=0, atol=1e-5)
    cosines = safe_ratio(rows @ mean, norms * np.linalg.norm(mean))
    tolerance = 1e-5 + safe_ratio(2 * rounding, np.linalg.norm(mean))
    np.testing.assert_allclose(gradients.cosines, cosines, rtol=0, atol=tolerance)
    for cosine in (gradients.cosines, gradients.pairwise_cosines):
        assert cosine.abs().max() <= 1
        assert (cosine[norms == 0] == 0).all()


@pytest.mark.parametrize("num_parameters", [2, 1000, 100_000])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_cosines_with_the_mean_survive_that_the_tasks_nearly_cancel(num_parameters: int, distance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    row, change = torch.randn(2, num_parameters, generator=generator)
    gradients = TaskGradients(["left", "right"], torch.stack([row, -row + distance * change]))
    rows = gradients.matrix.double()
    mean = rows.mean(dim=0)
    cosines = rows @ mean / (rows.norm(dim=1) * mean.norm())
    torch.testing.assert_close(gradients.cosines.double(), cosines, rtol=0, atol=5e-5)
    torch.testing.assert_close(gradients.mean_norm.double(), mean.norm(), rtol=5e-5, atol=0)


def test_figures_of_a_matrix_by_hand() -> None:
    gradients = TaskGradients(["a", "b", "c"], torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, -3.0]]))
    assert gradients.gramian.tolist() == [[9, 0, 0], [0, 0, 0], [0, 0, 9]]
    assert gradients.norms.tolist() == [3, 0, 3]
    assert gradients.mean.tolist() == [1, -1]
    assert gradients.mean_norm.item() == pytest.approx(2**0.5)
    assert gradients.cosines.tolist() == pytest.approx([0.5**0.5, 0, 0.5**0.5])
    assert gradients.pairwise_cosines.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_a_clone_keeps_what_the_next_step_overwrites() -> None:
    gradients = TaskGradients(["left", "right"], torch.eye(2))
    copy = gradients.clone()
    gradients.matrix.zero_()
    assert copy.names == ("left", "right")
    assert copy.norms.tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(3, 4), (2,), (2, 2, 2)])
def test_a_matrix_without_a_row_for_each_task_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`matrix` must have shape .* with 2 rows.*\['left', 'right'\].*got shape"):
        TaskGradients(["left", "right"], torch.zeros(shape))


@given(matrices())
@settings(deadline=None)
def test_conflicts_are_the_signs_of_the_cosines(matrix: np.ndarray) -> None:
    gradients = TaskGradients([str(index) for index in range(len(matrix))], torch.from_numpy(matrix))
    exact = matrix.astype(np.float64)
    products = exact @ exact.mean(axis=0)
    clear = np.abs(products) > 1e-5 * np.linalg.norm(exact, axis=1) * max(np.linalg.norm(exact, axis=1).max(), 1e-30)
    for conflict, product, is_clear in zip(gradients.conflicts, products, clear, strict=True):
        assert conflict == bool(product < 0) or not is_clear


def test_conflicts_of_nearly_cancelling_rows_come_from_the_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(10_000, generator=generator)
    other = -row + 1e-6 * torch.randn(10_000, generator=generator)
    gradients = TaskGradients(["left", "right", "none"], torch.stack([row, other, torch.zeros_like(row)]))
    assert gradients.conflicts == tuple((gradients.cosines < 0).tolist())
    assert not gradients.conflicts[2]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]], 0.0),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], 0.5**0.5),
        ([[0.0, 3.0, 4.0]], 5.0),
        ([[0.0, 3.0, 4.0], [0.0, 6.0, 8.0]], 5.0),
        ([[0.0, 3.0, 4.0], [0.0, 0.0, 0.0]], 0.0),
    ],
)
def test_pareto_stationarity_by_hand(rows: list[list[float]], expected: float) -> None:
    gradients = TaskGradients([f"task{i}" for i in range(len(rows))], torch.tensor(rows))
    assert gradients.pareto_stationarity.item() == pytest.approx(expected, abs=1e-6)


def test_pareto_stationarity_survives_that_the_tasks_nearly_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    row, change = torch.randn(2, 100_000, generator=generator)
    gradients = TaskGradients(["left", "right"], torch.stack([row, -row + 1e-3 * change]))
    left, right = gradients.matrix.double()
    weight = ((right @ right - left @ right) / (left - right).square().sum()).clamp(0, 1)
    expected = (weight * left + (1 - weight) * right).norm()
    assert gradients.pareto_stationarity.item() == pytest.approx(expected.item(), rel=1e-3)
    assert gradients.pareto_stationarity <= gradients.mean_norm


def test_pareto_stationarity_refuses_what_has_none() -> None:
    with pytest.raises(ValueError, match="without tasks"):
        _ = TaskGradients([], torch.empty(0, 3)).pareto_stationarity
    with pytest.raises(ValueError, match="is_finite"):
        _ = TaskGradients(["left", "right"], torch.tensor([[1.0, 2.0], [float("inf"), 0.0]])).pareto_stationarity
