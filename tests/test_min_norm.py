"""The shortest vector of a convex hull, by its optimality conditions and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cost._min_norm import shortest_combination


@st.composite
def vectors(draw: Any) -> torch.Tensor:
    """Vectors of very different lengths: independent ones, dependent ones, and some around the origin."""
    count, size = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponents = draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    rows = generator.standard_normal((count, size)) * 10.0 ** np.array(exponents)[:, None]
    rows += draw(st.sampled_from([0.0, 0.5, 5.0])) * generator.standard_normal(size)
    if draw(st.booleans()):
        rows[count // 2 :] = rows[: count - count // 2]
    return torch.from_numpy(rows)


@given(vectors())
@settings(deadline=None, max_examples=200)
def test_no_vertex_lies_nearer(rows: torch.Tensor) -> None:
    # The optimality condition of the problem: v_i . s >= s . s for every vector, with equality where it has weight.
    weights, length = shortest_combination(rows)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    shortest = weights @ rows
    smallest, largest = rows.norm(dim=1).min(), rows.norm(dim=1).max()
    assert length == pytest.approx(float(shortest.norm()), abs=1e-12 * float(largest))
    assert length <= smallest * (1 + 1e-12)
    assert (rows @ shortest / rows.norm(dim=1) >= shortest @ shortest / rows.norm(dim=1) - 1e-9 * smallest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "weights", "length"),
    [
        ([[3.0, 4.0]], [1.0], 5.0),
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5], 0.5**0.5),
        ([[2.0, 0.0], [-1.0, 0.0]], [1 / 3, 2 / 3], 0.0),
        # The short one is on the near side: the long one gets no weight.
        ([[1.0, 0.0], [5.0, 1.0]], [1.0, 0.0], 1.0),
        ([[1.0, 1.0], [0.0, 0.0]], [0.0, 1.0], 0.0),
        ([[0.0, 0.0], [0.0, 0.0]], [0.5, 0.5], 0.0),
        ([[1.0, 1.0], [1.0, -1.0], [-1.0, 0.0]], [0.25, 0.25, 0.5], 0.0),
        # Very different lengths: the short ones decide.
        ([[1e3, 0.0], [0.0, 2e-4], [0.0, -1e-4]], [0.0, 1 / 3, 2 / 3], 0.0),
        ([[1e3, 0.0], [1e-4, 1e-4], [1e-4, -1e-4]], [0.0, 0.5, 0.5], 1e-4),
        ([[1e8, 0.0], [1.0, 1e-8]], [0.0, 1.0], 1.0),
        # Nearly opposite: what is left of them is far below the rounding of their inner products.
        ([[1e9, 1.0], [-1e9, 1.0], [1e-3, 5.0]], [0.5, 0.5, 0.0], 1.0),
        # Squares of these overflow single precision, or underflow.
        ([[1e20, 0.0], [0.0, 1e20]], [0.5, 0.5], 1e20 * 0.5**0.5),
        ([[1e-25, 0.0], [0.0, 1e-25]], [0.5, 0.5], 1e-25 * 0.5**0.5),
    ],
)
def test_by_hand(rows: list[list[float]], weights: list[float], length: float, dtype: torch.dtype) -> None:
    found, norm = shortest_combination(torch.tensor(rows, dtype=dtype))
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.double))
    smallest = min(torch.tensor(rows).norm(dim=1).tolist())
    assert float(norm) == pytest.approx(length, rel=1e-6, abs=1e-12 * smallest)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_squares_of_doubles_may_overflow(size: float) -> None:
    assert float(shortest_combination(torch.eye(2).double() * size)[1]) == pytest.approx(size * 0.5**0.5)


def test_many_dependent_vectors_in_pieces_are_solved() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 70_000, generator=generator) * torch.logspace(0, -3, 40)[:, None]
    rows[20:] = -rows[:20]
    weights, length = shortest_combination(rows)
    assert length <= 1e-9
    assert (weights @ rows.double()).norm() <= 1e-9


def test_vectors_of_no_elements_have_no_length() -> None:
    weights, length = shortest_combination(torch.zeros(2, 0))
    assert weights.tolist() == [0.5, 0.5]
    assert length == 0
