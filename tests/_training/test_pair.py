"""One task and the sum of the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_cost._lightning.ranks import Ranks
from lightning_cost._training.accumulator import ExpectedNorms
from lightning_cost._training.evaluate import Numerics
from lightning_cost._training.pair import TaskPair
from lightning_cost.gradients import TaskGradients

ROWS = {"a": [3.0, 0.0], "b": [0.5, 0.5], "c": [-1.0, 2.0], "d": [0.0, -4.0]}


def losses_of(shared: Parameter) -> dict[str, Tensor]:
    return {name: (shared * torch.tensor(row)).sum() for name, row in ROWS.items()}


def mean_of(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).mean()


def pair_of(shared: Parameter, weight: float | None, losses: dict[str, Tensor], task: str = "b") -> TaskPair:
    pair = TaskPair(task, [shared], Numerics(Ranks(), 1.0, None), None)
    values = {name: float(loss) for name, loss in losses.items()}
    pair.add(losses, weight, 1.0, lambda: mean_of(losses).backward(retain_graph=True), values)
    pair.accumulator.complete()
    return pair


@pytest.mark.parametrize("weight", [0.25, None])
def test_the_cosine_is_that_of_definition_1(weight: float | None) -> None:
    shared = Parameter(torch.ones(2))
    pair = pair_of(shared, weight, losses_of(shared))
    rows = pair.accumulator.gradients
    assert rows is not None
    assert torch.equal(rows.matrix, torch.tensor([[0.5, 0.5], [2.0, -2.0]]))
    whole = TaskGradients(tuple(ROWS), torch.tensor(list(ROWS.values())))
    assert float(rows.cosines[0]) == pytest.approx(float(whole.cosines[1]))
    # b is orthogonal to the others, so it does not conflict.
    assert not pair.conflicts


@pytest.mark.parametrize("task", ["a", "c", "d"])
def test_it_conflicts_where_the_task_does(task: str) -> None:
    shared = Parameter(torch.ones(2))
    whole = TaskGradients(tuple(ROWS), torch.tensor(list(ROWS.values())))
    expected = bool(whole.cosines[list(ROWS).index(task)] < 0)
    assert pair_of(shared, 0.25, losses_of(shared), task).conflicts == expected


@pytest.mark.parametrize("rates", [{}, {"a": 1.0, "c": 2.0, "d": 9.0}])
def test_expansion_gives_the_rows_of_all_tasks(rates: dict[str, float]) -> None:
    shared, expected = Parameter(torch.ones(2)), ExpectedNorms()
    expected.rates = rates
    losses = losses_of(shared)
    pair = pair_of(shared, 0.25, losses)
    grad = shared.grad.clone()  # type: ignore[union-attr]
    full = pair.expanded([losses], 1.0, expected, None)
    assert full.gradients is not None
    assert full.gradients.names == tuple(ROWS)
    torch.testing.assert_close(full.gradients.matrix, torch.tensor(list(ROWS.values())))
    assert full.whole
    assert torch.equal(shared.grad, grad)  # type: ignore[arg-type]


def test_the_rate_is_that_of_the_task_alone() -> None:
    shared = Parameter(torch.full((2,), 2.0))
    assert pair_of(shared, 0.25, losses_of(shared)).rate() == {"b": pytest.approx(0.5**0.5 / 2)}


@pytest.mark.parametrize(
    ("rates", "losses", "task"),
    [
        ({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, "a"),
        ({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 9.0, "b": 1.0, "c": 1.0}, "b"),
        # A task without a loss is not asked.
        ({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, {"a": 0.0, "b": 1.0, "c": 1.0, "d": 1.0}, "b"),
        # With two tasks, the other one comes by subtraction anyway.
        ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0}, None),
        # Nothing is known of c.
        ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, None),
        ({"a": 0.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, None),
    ],
)
def test_the_task_with_the_smallest_expected_gradient(
    rates: dict[str, float], losses: dict[str, float], task: str | None
) -> None:
    expected = ExpectedNorms()
    expected.means = rates
    assert expected.smallest(losses) == task
