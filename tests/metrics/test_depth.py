"""Depth errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lightning_cost.metrics import AbsoluteDepthError, RelativeDepthError, depth_error


def test_depth_error_of_hand_computed_values_and_its_gradient() -> None:
    preds = tensor([[1.5, 3.0, float("nan")]], requires_grad=True)
    target = tensor([[1.0, 4.0, 0.0]])
    relative = depth_error(preds, target, relative=True)
    assert_close(relative.detach(), tensor((0.5 / 1 + 1 / 4) / 2))
    for value in (relative, RelativeDepthError(average="batch")(preds, target)):
        (gradient,) = torch.autograd.grad(value, preds)
        assert_close(gradient, tensor([[0.5, -0.125, 0.0]]))
    assert depth_error(tensor([3, 7]), tensor([1, 0])).dtype == torch.float32
    assert depth_error(preds, torch.zeros(1, 3)).isnan()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: AbsoluteDepthError(average="image"), ValueError, r"`average` must be one of .*'batch'.*'image'"),
        (lambda: depth_error(torch.ones(2, 1), torch.ones(2)), ValueError, r"same shape, got \(2, 1\) and \(2,\)"),
        (lambda: depth_error(torch.ones(2), torch.ones(2), torch.ones(2)), TypeError, r"`mask` must hold booleans"),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
