"""A surface of plain functions, without a module and a Trainer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_cost import Surface


def test_a_position_is_a_copy_of_its_own() -> None:
    weight = Parameter(torch.tensor([1.0, 2.0]))
    surface = Surface(lambda: {"left": weight.sum(), "right": weight[0] ** 2}, [weight])
    origin = surface.position()
    ahead = surface.position().add_(1.0)
    surface.move_to(ahead)
    ahead.zero_()
    assert weight.tolist() == [2.0, 3.0]
    surface.move_to(origin)
    assert weight.tolist() == [1.0, 2.0]


def test_a_held_position_is_forgotten_with_the_next_move() -> None:
    weight = Parameter(torch.tensor([1.0, 2.0]))
    surface = Surface(lambda: {"left": weight.sum(), "right": weight[0] ** 2}, [weight])
    surface.hold(surface.position())
    for _ in range(2):
        with surface.displaced(torch.ones(2)):
            assert weight.tolist() == [2.0, 3.0]
        assert weight.tolist() == [1.0, 2.0]
    surface.move_by(torch.ones(2))
    with surface.displaced(torch.ones(2)):
        assert weight.tolist() == [3.0, 4.0]
    assert weight.tolist() == [2.0, 3.0]


def test_only_the_parameters_of_the_surface_get_a_gradient() -> None:
    weight, head = Parameter(torch.tensor([1.0, 2.0])), Parameter(torch.tensor(3.0))
    inputs = torch.ones(2, requires_grad=True)
    surface = Surface(lambda: {"left": head * (inputs * weight).sum(), "right": weight[0] ** 2}, [weight])
    surface.point()
    assert weight.grad is not None
    assert head.grad is None
    assert inputs.grad is None


def test_scalarizations_of_ones_own() -> None:
    weight = Parameter(torch.tensor([1.0, 2.0]))

    def losses() -> dict[str, Tensor]:
        return {"left": weight.sum(), "right": weight[0] ** 2}

    for scalarize in (
        lambda by_task: by_task["left"] + 2 * by_task["right"],
        lambda by_task: (by_task["left"] + 2 * by_task["right"], None),
    ):
        point = Surface(losses, [weight], scalarize=scalarize).point()
        assert weight.grad is not None
        assert weight.grad.tolist() == [5.0, 1.0]
        assert point.gradients.matrix.tolist() == [[1.0, 1.0], [2.0, 0.0]]


def test_losses_are_checked() -> None:
    weight, calls = Parameter(torch.tensor([1.0, 2.0])), []

    def losses() -> dict[str, Tensor]:
        calls.append(0)
        both = {"left": weight.sum(), "right": weight[0] ** 2}
        return both if len(calls) % 2 else dict(reversed(both.items()))

    surface = Surface(losses, [weight])
    assert surface.losses().tolist() == surface.losses().tolist() == [3.0, 1.0]
    with pytest.raises(ValueError, match="The loss of task 'left' must be a scalar tensor"):
        Surface(lambda: {"left": weight}, [weight]).losses()
    with pytest.raises(TypeError, match="must return a dictionary"):
        Surface(lambda: [weight.sum()], [weight]).losses()  # type: ignore[arg-type, return-value]


def test_several_batches_are_averaged() -> None:
    weight = Parameter(torch.tensor([1.0, 2.0]))
    batches: list[Callable[[], dict[str, Tensor]]] = [
        lambda: {"left": weight.sum(), "right": weight[0] ** 2},
        lambda: {"left": 3 * weight.sum(), "right": weight[1] ** 2},
    ]
    surface = Surface(batches, [weight])
    assert torch.equal(surface.losses(), torch.tensor([6.0, 2.5]))
    assert torch.equal(surface.point().gradients.matrix, torch.tensor([[2.0, 2.0], [1.0, 2.0]]))


def test_shared_parameters_are_there_once_and_trained() -> None:
    weight, frozen = Parameter(torch.ones(2)), Parameter(torch.ones(2), requires_grad=False)
    for shared, message in (([], "at least one"), ([weight, weight], "each once"), ([weight, frozen], "a frozen one")):
        with pytest.raises(ValueError, match=f"`shared` must hold .*{message}"):
            Surface(lambda: {"left": weight.sum()}, shared)
