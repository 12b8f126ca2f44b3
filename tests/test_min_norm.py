"""The shortest vector of a convex hull, by its optimality conditions and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cost._min_norm import min_norm_weights


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
    weights = min_norm_weights(rows @ rows.T)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    shortest = weights @ rows
    scale = rows.norm(dim=1).max() ** 2
    assert (rows @ shortest - shortest @ shortest).min() >= -1e-9 * scale


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[3.0, 4.0]], [1.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),
        ([[2.0, 0.0], [-1.0, 0.0]], [1 / 3, 2 / 3]),
        # The short one is on the near side: the long one gets no weight.
        ([[1.0, 0.0], [5.0, 1.0]], [1.0, 0.0]),
        ([[1.0, 1.0], [0.0, 0.0]], [0.0, 1.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.5, 0.5]),
        ([[1.0, 1.0], [1.0, -1.0], [-1.0, 0.0]], [0.25, 0.25, 0.5]),
    ],
)
def test_by_hand(rows: list[list[float]], expected: list[float]) -> None:
    matrix = torch.tensor(rows)
    torch.testing.assert_close(min_norm_weights(matrix @ matrix.T), torch.tensor(expected, dtype=torch.double))


def test_a_gramian_with_the_rounding_of_single_precision_is_solved() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 500, generator=generator) * torch.logspace(0, -3, 40)[:, None]
    rows[20:] = -rows[:20]
    weights = min_norm_weights(rows @ rows.T)
    assert (weights @ rows.double()).norm() <= 1e-6
