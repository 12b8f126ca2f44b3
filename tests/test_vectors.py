"""Flat vectors of the shared parameters, against concatenations written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing import assert_close

from lightning_cost._vectors import (
    accumulate,
    assign,
    columns,
    combine,
    flatten,
    norm_of,
    num_elements,
    row_dtype,
    views,
    zeros_like_shared,
)

SHARED = [Parameter(torch.zeros(2, 3)), Parameter(torch.zeros(())), Parameter(torch.zeros(4))]
MATRIX = torch.arange(6.0).view(2, 3)
VECTOR = torch.tensor([7.0, 8.0, 9.0, 10.0])


def test_a_tensor_that_is_missing_counts_as_zeros() -> None:
    flat = flatten([MATRIX, None, VECTOR], SHARED)
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 10]
    assert num_elements(SHARED) == len(flat) == 11
    assert torch.equal(zeros_like_shared(SHARED), torch.zeros(11))
    assign([None, torch.tensor(6.0), None], SHARED, flat)
    assert flat.tolist() == [0] * 6 + [6] + [0] * 4


def test_accumulating_adds_a_multiple() -> None:
    flat = torch.ones(11)
    accumulate([MATRIX, None, VECTOR], SHARED, flat, -2.0)
    assert flat.tolist() == [1, -1, -3, -5, -7, -9, 1, -13, -15, -17, -19]


def test_sparse_tensors_are_written_and_added() -> None:
    flat = flatten([MATRIX.to_sparse(), None, None], SHARED)
    accumulate([MATRIX.to_sparse(), None, None], SHARED, flat)
    assert flat.tolist() == [0, 2, 4, 6, 8, 10, 0, 0, 0, 0, 0]


def test_views_share_their_memory_with_the_vector() -> None:
    flat = torch.zeros(11)
    shapes = []
    for number, view in enumerate(views(flat, SHARED)):
        view.fill_(number)
        shapes.append(view.shape)
    assert shapes == [parameter.shape for parameter in SHARED]
    assert flat.tolist() == [0] * 6 + [1] + [2] * 4
    assert [piece.shape for piece in columns(torch.zeros(5, 11), SHARED)] == [(5, 6), (5, 1), (5, 4)]


def test_a_number_of_tensors_other_than_that_of_the_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        flatten([MATRIX, None], SHARED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_sums_of_rows_are_those_of_a_matrix_product(dtype: torch.dtype) -> None:
    matrix = torch.randn(3, 11, generator=torch.Generator().manual_seed(0), dtype=dtype)
    weights = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    found = combine(matrix, weights)
    assert found.dtype == dtype
    assert_close(found, weights.to(dtype) @ matrix)
    assert_close(combine(matrix[:1], weights[:1]), 0.5 * matrix[0])


def test_the_norm_is_that_of_all_elements() -> None:
    tensors: list[Tensor] = [torch.tensor([[3.0]]), torch.tensor(4.0), Parameter(torch.tensor([12.0]))]
    assert norm_of(tensors) == pytest.approx(13.0)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
    ],
)
def test_vectors_have_the_widest_type_and_at_least_single_precision(
    dtypes: list[torch.dtype], expected: torch.dtype
) -> None:
    shared = [Parameter(torch.ones(2, dtype=dtype)) for dtype in dtypes]
    assert row_dtype(shared) == expected
    assert (
        flatten([parameter.detach() for parameter in shared], shared).dtype
        == zeros_like_shared(shared).dtype
        == expected
    )
