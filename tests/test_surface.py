"""The task losses as a function of the shared parameters: every evaluation against autograd on a pure function."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchjd.aggregation import UPGrad
from torchjd.scalarization import Constant

from lightning_cost.surface import Point, Surface
from tests.support.problems import (
    Problem,
    conv_batch,
    conv_problem,
    flat_parameters,
    jacobian,
    loss_function,
    mlp_batch,
    mlp_problem,
    surface_of,
)

exactly = functools.partial(assert_close, rtol=1e-10, atol=1e-12)


def noise(surface: Surface, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(surface.num_parameters, generator=generator, dtype=torch.float64)


def hessian_vector(losses: Any, position: Tensor, weights: Tensor, vector: Tensor) -> Tensor:
    return torch.autograd.functional.hvp(lambda x: weights.double() @ losses(x), position, vector)[1]


def test_needs_a_batch() -> None:
    with pytest.raises(ValueError, match="`batches` must hold at least one function; got none"):
        surface_of(mlp_problem())


def test_position_is_the_shared_parameters_and_nothing_else() -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch())
    assert surface.num_parameters == 5 * 6 + 6 + 6 * 4 + 4
    assert torch.equal(surface.position(), flat_parameters(module))
    heads = [p.detach().clone() for p in module.heads.parameters()]
    target = noise(surface)
    identities = [id(p) for p in module.parameters()]
    surface.move_to(target)
    assert torch.equal(flat_parameters(module), target)
    assert [id(p) for p in module.parameters()] == identities
    assert all(torch.equal(p, before) for p, before in zip(module.heads.parameters(), heads, strict=True))


def test_position_is_a_copy() -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch())
    position = surface.position()
    before = position.clone()
    surface.move_to(position + 1)
    assert torch.equal(position, before)


@pytest.mark.parametrize(("problem", "batch"), [(mlp_problem, mlp_batch), (conv_problem, conv_batch)])
@pytest.mark.parametrize("num_batches", [1, 3])
def test_losses_and_gradients_equal_autograd(problem: Any, batch: Any, num_batches: int) -> None:
    module = problem()
    batches = [batch(seed=seed) for seed in range(num_batches)]
    surface, losses = surface_of(module, *batches), loss_function(module, *batches)
    position = flat_parameters(module) + 0.1
    surface.move_to(position)
    matrix = jacobian(losses, position).detach()
    weights = torch.tensor([0.3, -2.0, 1.1], dtype=torch.float64)

    exactly(surface.losses(), losses(position).detach())
    values, gradient = surface.gradient(weights)
    exactly(values, losses(position).detach())
    exactly(gradient, weights @ matrix)
    point = surface.point()
    exactly(point.losses, losses(position).detach())
    exactly(point.gradients.matrix, matrix)
    assert point.gradients.names == ("task0", "task1", "task2")
    assert torch.equal(surface.position(), position)


@pytest.mark.parametrize("num_batches", [1, 2])
def test_weights_may_depend_on_the_losses_of_all_batches(num_batches: int) -> None:
    module = mlp_problem()
    batches = [mlp_batch(seed=seed) for seed in range(num_batches)]
    surface, losses = surface_of(module, *batches), loss_function(module, *batches)
    position = flat_parameters(module)
    expected = losses(position).detach()
    values, gradient = surface.gradient(lambda seen: 2 * seen)
    exactly(values, expected)
    exactly(gradient, 2 * expected @ jacobian(losses, position).detach())


@pytest.mark.parametrize("num_batches", [1, 2])
def test_a_weight_of_zero_leaves_its_task_out(num_batches: int) -> None:
    module = mlp_problem()
    batches = [mlp_batch(seed=seed) for seed in range(num_batches)]
    surface, losses = surface_of(module, *batches), loss_function(module, *batches)
    matrix = jacobian(losses, flat_parameters(module)).detach()
    values, gradient = surface.gradient(torch.tensor([0.0, 2.0, 0.0]))
    exactly(values, losses(flat_parameters(module)).detach())
    exactly(gradient, 2 * matrix[1])
    values, gradient = surface.gradient(torch.zeros(3))
    exactly(values, losses(flat_parameters(module)).detach())
    assert gradient.shape == (surface.num_parameters,)
    assert not gradient.any()


@pytest.mark.parametrize("num_batches", [1, 2])
def test_hessian_vector_products_equal_autograd(num_batches: int) -> None:
    module = conv_problem()
    batches = [conv_batch(seed=seed) for seed in range(num_batches)]
    surface, losses = surface_of(module, *batches), loss_function(module, *batches)
    weights = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.2, -1.0, 3.0])]
    vectors = [noise(surface, 1), noise(surface, 2)]
    products = surface.hessian_vector_products(weights, vectors)
    for product, weight, vector in zip(products, weights, vectors, strict=True):
        exactly(product, hessian_vector(losses, flat_parameters(module), weight, vector))


def test_hessian_of_a_loss_that_is_linear_is_zero() -> None:
    class Linear(Problem):
        def task_losses(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            output = self.backbone(batch["x"]).mean(dim=0)
            return {"task0": output[0], "task1": output[1] - 2 * output[0]}

    module = Linear(nn.Linear(5, 2), 2, scales=[1.0, 1.0]).double()
    surface = surface_of(module, mlp_batch(num_tasks=2))
    (product,) = surface.hessian_vector_products([torch.ones(2)], [noise(surface)])
    assert torch.equal(product, torch.zeros(surface.num_parameters, dtype=torch.float64))


def test_a_shared_parameter_that_no_task_touches_has_zero_gradient() -> None:
    module = mlp_problem()
    module.backbone.register_parameter("idle", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    surface = surface_of(module, mlp_batch())
    idle = slice(0, 3)
    assert torch.equal(surface.position()[idle], torch.ones(3, dtype=torch.float64))
    weights = torch.ones(3)
    point = surface.point()
    (product,) = surface.hessian_vector_products([weights], [noise(surface)])
    for vector in (surface.gradient(weights)[1], *point.gradients.matrix, product):
        assert not vector[idle].any()
        assert vector[3:].any()


@pytest.mark.parametrize(
    ("method", "total"),
    [(None, [1 / 3] * 3), (UPGrad(), [1.0] * 3), (Constant(torch.tensor([0.5, 2, 1])), [0.5, 2, 1])],
)
def test_a_point_leaves_the_gradient_of_the_scalarized_loss_in_grad(method: Any, total: list[float]) -> None:
    module = mlp_problem(method=method)
    batches = [mlp_batch(seed=seed) for seed in range(2)]
    surface, losses = surface_of(module, *batches), loss_function(module, *batches)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    point = surface.point()
    weights = torch.tensor(total, dtype=torch.float64)
    matrix = jacobian(losses, flat_parameters(module)).detach()
    exactly(torch.cat([p.grad.reshape(-1) for p in module.backbone.parameters()]), weights @ matrix)
    exactly(point.gradients.matrix, matrix)
    scalar = sum(weights @ module(batch) for batch in batches) / 2
    heads = list(module.heads.parameters())
    for parameter, expected in zip(heads, torch.autograd.grad(scalar, heads), strict=True):
        exactly(parameter.grad, expected)


@pytest.mark.parametrize("num_batches", [1, 2])
def test_a_point_that_is_not_admitted_is_not_differentiated(num_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mlp_problem()
    surface = surface_of(module, *[mlp_batch(seed=seed) for seed in range(num_batches)])
    expected = surface.losses()
    seen: list[Tensor] = []

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("differentiated")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    monkeypatch.setattr(Tensor, "backward", forbidden)
    surface.forwards = 0
    assert surface.point_if(lambda losses: bool(seen.append(losses))) is None
    assert len(seen) == 1
    exactly(seen[0], expected)
    assert (surface.forwards, surface.backwards) == (num_batches, 0)


@pytest.mark.parametrize("num_batches", [1, 2])
def test_a_point_that_is_admitted_is_the_same_as_without_the_question(num_batches: int) -> None:
    module = mlp_problem()
    surface = surface_of(module, *[mlp_batch(seed=seed) for seed in range(num_batches)])
    point = surface.point_if(lambda losses: True)
    assert point is not None
    expected = surface.point()
    exactly(point.losses, expected.losses)
    exactly(point.gradients.matrix, expected.gradients.matrix)


def test_going_back_is_exact() -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch())
    for parameter in module.heads.parameters():
        parameter.grad = torch.randn_like(parameter)
    module.backbone[0].weight.grad = torch.randn_like(module.backbone[0].weight)
    parameters = [p.detach().clone() for p in module.parameters()]
    tensors = [p.grad for p in module.parameters()]
    values = [None if grad is None else grad.clone() for grad in tensors]
    position, grads = surface.position(), surface.grads()

    surface.move_to(position * 1.1 + 0.3)
    surface.point()
    surface.gradient(torch.ones(3))
    surface.hessian_vector_products([torch.ones(3)], [position])
    surface.go_back(position, grads)

    for parameter, before, tensor, value in zip(module.parameters(), parameters, tensors, values, strict=True):
        assert torch.equal(parameter, before)
        assert parameter.grad is tensor
        assert value is None or torch.equal(parameter.grad, value)


class Counted:
    """Counts what really runs: forward passes of the module, and calls into autograd."""

    def __init__(self, module: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards = self.backwards = 0
        evaluate, grad, backward = module.task_losses, torch.autograd.grad, Tensor.backward

        def count_forward(*args: Any) -> Any:
            self.forwards += 1
            return evaluate(*args)

        def count_grad(*args: Any, **kwargs: Any) -> Any:
            # A method that weighs losses differentiates its value with respect to the losses, which costs nothing.
            self.backwards += not isinstance(args[1], Tensor)
            return grad(*args, **kwargs)

        def count_backward(*args: Any, **kwargs: Any) -> None:
            self.backwards += 1
            backward(*args, **kwargs)

        monkeypatch.setattr(module, "task_losses", count_forward)
        monkeypatch.setattr(torch.autograd, "grad", count_grad)
        monkeypatch.setattr(Tensor, "backward", count_backward)


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize("method", [None, UPGrad(), Constant(torch.ones(4))])
def test_counters_count_what_ran(num_batches: int, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mlp_problem(num_tasks=4, method=method)
    surface = surface_of(module, *[mlp_batch(num_tasks=4, seed=seed) for seed in range(num_batches)])
    assert (surface.forwards, surface.backwards) == (0, 0)
    counted, position = Counted(module, monkeypatch), surface.position()
    for evaluate in (
        surface.losses,
        lambda: surface.gradient(torch.ones(4)),
        lambda: surface.gradient(torch.zeros(4)),
        lambda: surface.gradient(lambda losses: losses),
        lambda: surface.hessian_vector_products([torch.ones(4)] * 2, [position] * 2),
        lambda: surface.point_if(lambda losses: False),
    ):
        evaluate()
        assert (surface.forwards, surface.backwards) == (counted.forwards, counted.backwards)


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize("admit", [None, lambda losses: True])
@pytest.mark.parametrize(
    ("method", "warm"),
    [
        (None, True),
        (UPGrad(), True),
        (UPGrad(), False),
        (Constant(torch.ones(4)), True),
    ],
)
def test_counters_count_what_a_point_takes(
    num_batches: int, admit: Any, method: Any, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = mlp_problem(num_tasks=4, method=method)
    surface = surface_of(module, *[mlp_batch(num_tasks=4, seed=seed) for seed in range(num_batches)])
    near = surface.point() if warm else None
    surface.forwards = surface.backwards = 0
    counted = Counted(module, monkeypatch)
    surface.point(near) if admit is None else surface.point_if(admit, near)
    assert (surface.forwards, surface.backwards) == (counted.forwards, counted.backwards)


def test_dropout_masks_are_those_of_the_recorded_step() -> None:
    module = mlp_problem()
    module.backbone.insert(1, nn.Dropout(0.5))
    torch.manual_seed(3)
    batch = mlp_batch()
    state = torch.get_rng_state()
    surface = surface_of(module, batch)
    torch.set_rng_state(state)
    expected = module(batch).detach()
    torch.manual_seed(99)
    assert torch.equal(surface.losses(), expected)
    assert torch.equal(surface.losses(), expected)
    assert torch.equal(surface.gradient(torch.ones(3))[0], expected)
    assert torch.equal(surface.point().losses, expected)
    assert not torch.equal(module(batch), expected)


def test_random_vectors_come_from_the_generator_alone() -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch(), seed=4)
    state = torch.get_rng_state()
    first, second = surface.standard_normal(), surface.standard_normal()
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (surface.num_parameters,)
    assert first.dtype == torch.float64
    assert not torch.equal(first, second)
    again = surface_of(module, mlp_batch(), seed=4)
    torch.rand(3)
    assert torch.equal(again.standard_normal(), first)


def test_losses_are_evaluated_in_the_precision_of_training() -> None:
    module = mlp_problem().float()
    batch = {name: value.float() for name, value in mlp_batch().items()}
    surface = surface_of(module, batch, precision="bf16-mixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(batch).detach()
    assert torch.equal(surface.losses(), expected)
    assert not torch.equal(expected, module(batch))


def test_half_precision_parameters_have_gradients_in_float32() -> None:
    module = mlp_problem().bfloat16()
    surface = surface_of(module, {name: value.bfloat16() for name, value in mlp_batch().items()})
    position = surface.position()
    assert position.dtype == torch.float32
    assert surface.point().gradients.matrix.dtype == torch.float32
    before = [p.detach().clone() for p in module.parameters()]
    surface.move_to(position)
    assert all(torch.equal(p, value) for p, value in zip(module.parameters(), before, strict=True))


def test_a_point_without_task_gradients_says_so() -> None:
    with pytest.raises(RuntimeError, match="`uses_task_gradients = True`"):
        _ = Point(torch.ones(2)).gradients
