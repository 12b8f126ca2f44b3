"""Which task losses are refused, and by which names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torchjd import scalarization
from torchjd.aggregation import UPGrad

from lightning_cost._training.engine import Engine
from lightning_cost._training.evaluate import check_finite, check_losses, grads_are_finite, present, values_of
from tests.support.nets import Net, assert_moved, assert_same_parameters, fit, make_batches


def test_losses_may_differ_in_type() -> None:
    class Mixed(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            left, right, ink = self.losses(batch).values()
            return {"left": left.bfloat16(), "right": right.double(), "ink": ink}

    module = Mixed(UPGrad())
    fit(module, make_batches(3))
    assert_moved(module)
    assert module.task_gradients.matrix.dtype == torch.float32


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda losses: losses | {"right": losses["right"].expand(2)}, ValueError, r"'right' must be a scalar.*\(2,\)"),
        (
            lambda losses: losses | {"ink": 0.5},
            ValueError,
            "'ink' must be a scalar tensor, or None without labels; got type float",
        ),
        (lambda losses: losses | {"ink": losses["ink"].detach()}, ValueError, "'ink' has no graph.*return None"),
        (
            lambda losses: losses | {"ink": torch.tensor(1)},
            ValueError,
            "'ink' must be a floating-point number; got torch.i",
        ),
        (lambda losses: losses | {"ink": losses["ink"] * 1j}, ValueError, "'ink' must be a floating-point.*complex64"),
        (lambda losses: losses | {1: losses["ink"]}, TypeError, "dictionary with a scalar tensor per task"),
        (lambda losses: losses | {"left": losses["left"] * torch.nan}, ValueError, "task 'left' is not finite.*nan"),
        (lambda losses: losses | {"ink": losses["ink"] / 0}, ValueError, "task 'ink' is not finite: {'ink': inf}"),
        (lambda losses: {}, ValueError, r"`task_losses` of Bad returned no task; got \{\}"),
        (lambda losses: list(losses.values()), TypeError, r"dictionary with a scalar tensor per task.*got \["),
        (lambda losses: sum(losses.values()), TypeError, "dictionary with a scalar tensor per task.*got tensor"),
        (lambda losses: None, TypeError, "dictionary with a scalar tensor per task.*got None"),
    ],
)
@pytest.mark.parametrize("method", [None, UPGrad(), scalarization.UW(3)])
def test_bad_losses_are_refused_by_name_before_anything_changes(
    returned: Any, error: type[Exception], message: str, method: Any
) -> None:
    class Bad(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            return returned(self.losses(batch))

    module = Bad(method)
    with pytest.raises(error, match=message):
        fit(module, make_batches(1))
    assert_same_parameters(module, Net())


def test_all_losses_that_are_not_finite_are_named() -> None:
    module = Net(scales=(torch.nan, 1.0, torch.inf))
    with pytest.raises(ValueError, match="loss of task 'left', 'ink' is not finite"):
        fit(module, make_batches(1))


@pytest.mark.parametrize("method", [None, UPGrad()])
def test_a_task_that_appears_later_counts_from_there_and_is_said(method: Any) -> None:
    class Changing(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            losses = self.losses(batch)
            return losses | {"new": losses["left"]} if batch_idx == 2 else losses

    module = Changing(method)
    with pytest.warns(
        UserWarning, match=r"returned 'new' for the first time, beside the tasks \['left', 'right', 'ink'\]"
    ):
        fit(module, make_batches(4))
    assert Engine(module).names == ("left", "right", "ink", "new")


def test_losses_are_put_in_the_order_of_the_run_and_in_single_precision() -> None:
    losses = {"right": torch.tensor(1.0, dtype=torch.float16), "left": torch.tensor(2.0, dtype=torch.float64)}
    assert list(check_losses(losses)) == ["right", "left"]
    found = present(check_losses(losses | {"ink": None}), ["left", "ink", "right"])
    assert list(found) == ["left", "right"]
    assert [loss.dtype for loss in found.values()] == [torch.float64, torch.float32]
    assert values_of(found).tolist() == [2.0, 1.0]
    assert values_of(found, ["left", "ink", "right"]).tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("gradients", "finite"),
    [
        ([], True),
        ([None, torch.ones(3)], True),
        ([torch.tensor([1.0, torch.nan, 0.0]), torch.ones(3)], False),
        ([torch.ones(3), torch.tensor([1.0, -torch.inf, 0.0])], False),
        ([torch.eye(3)[0].to_sparse()], True),
        ([torch.tensor([0.0, torch.inf, 0.0]).to_sparse()], False),
    ],
)
def test_gradients_that_are_not_finite_are_found(gradients: list[Tensor | None], finite: bool) -> None:
    parameters = []
    for gradient in gradients:
        parameters.append(Parameter(torch.zeros(3)))
        parameters[-1].grad = gradient
    assert grads_are_finite(parameters) is finite


def test_figures_that_are_not_finite_are_named() -> None:
    check_finite({"left": 1.0, "right": -2.0}, "The gradient")
    with pytest.raises(
        ValueError, match=r"The gradient of task 'left', 'ink' is not finite: {'left': nan, 'ink': inf}"
    ):
        check_finite({"left": math.nan, "right": 1.0, "ink": math.inf}, "The gradient")
