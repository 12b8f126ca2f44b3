"""What a teleport increases: values and gradients against independent float64 evaluations, Eq. 8 to 10 by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_cost.objectives import (
    ConflictAlignment,
    GradientNorm,
    Objective,
    RandomDirection,
    Reversed,
    SampledSharpness,
    balance_weights,
)
from lightning_cost.surface import Point, Surface
from tests.support.problems import (
    LossFunction,
    Problem,
    conv_batch,
    conv_problem,
    flat_parameters,
    jacobian,
    loss_function,
    mlp_batch,
    mlp_problem,
    rows,
    surface_of,
)


def smallest_cosine(losses: LossFunction, position: Tensor) -> Tensor:
    matrix = jacobian(losses, position)
    mean = matrix.mean(dim=0)
    return torch.stack([row @ mean / (row.norm() * mean.norm()) for row in matrix]).min()


def mean_gradient_norm(losses: LossFunction, position: Tensor) -> Tensor:
    return jacobian(losses, position).mean(dim=0).norm()


def differentiated(function: Any, losses: LossFunction, position: Tensor) -> tuple[float, Tensor]:
    position = position.clone().requires_grad_()
    value = function(losses, position)
    return value.item(), torch.autograd.grad(value, position)[0]


SMOOTH = [(ConflictAlignment, smallest_cosine), (GradientNorm, mean_gradient_norm)]
PROBLEMS = [(mlp_problem, mlp_batch), (conv_problem, conv_batch)]


@pytest.mark.parametrize(("kind", "reference"), SMOOTH)
@pytest.mark.parametrize(("problem", "batch"), PROBLEMS)
@pytest.mark.parametrize(("num_tasks", "num_batches"), [(2, 1), (3, 2), (5, 1)])
def test_value_and_gradient_equal_autograd_and_each_other(
    kind: Any, reference: Any, problem: Any, batch: Any, num_tasks: int, num_batches: int
) -> None:
    module = problem(num_tasks=num_tasks)
    batches = [batch(num_tasks=num_tasks, seed=seed) for seed in range(num_batches)]
    surface = surface_of(module, *batches)
    point, position = surface.point(), surface.position()
    expected, gradient = differentiated(reference, loss_function(module, *batches), position)

    twice = kind("double_backward").value_and_gradient(surface, point)
    assert_close(twice[0], expected, rtol=1e-10, atol=1e-12)
    assert_close(twice[1], gradient, rtol=1e-9, atol=1e-11)

    once = kind("finite_difference", epsilon=1e-6).value_and_gradient(surface, point)
    assert_close(once[0], expected, rtol=1e-10, atol=1e-12)
    assert (once[1] - gradient).norm() <= 1e-4 * gradient.norm()

    assert_close(kind().value(surface, point), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(surface.position(), position)


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_the_mean_term_is_the_derivative_through_the_mean_alone(num_tasks: int) -> None:
    def through_the_mean(losses: LossFunction, position: Tensor) -> Tensor:
        matrix = jacobian(losses, position)
        mean = matrix.mean(dim=0)
        return torch.stack([row.detach() @ mean / (row.detach().norm() * mean.norm()) for row in matrix]).min()

    module, batch = mlp_problem(num_tasks=num_tasks), mlp_batch(num_tasks=num_tasks)
    surface = surface_of(module, batch)
    expected, gradient = differentiated(through_the_mean, loss_function(module, batch), surface.position())
    twice = ConflictAlignment("double_backward", terms="mean").value_and_gradient(surface, surface.point())
    assert_close(twice[0], expected, rtol=1e-10, atol=1e-12)
    assert_close(twice[1], gradient, rtol=1e-9, atol=1e-11)
    once = ConflictAlignment(epsilon=1e-6, terms="mean").value_and_gradient(surface, surface.point())
    assert (once[1] - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize(("kind", "reference"), SMOOTH)
def test_finite_differences_are_of_first_order(kind: Any, reference: Any) -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch())
    gradient = differentiated(reference, loss_function(module, mlp_batch()), surface.position())[1]
    errors = [
        (kind(epsilon=epsilon).value_and_gradient(surface, surface.point())[1] - gradient).norm()
        for epsilon in (1e-3, 1e-4, 1e-5)
    ]
    assert_close(errors[1] / errors[0], torch.tensor(0.1, dtype=torch.float64), rtol=0.2, atol=0)
    assert_close(errors[2] / errors[1], torch.tensor(0.1, dtype=torch.float64), rtol=0.2, atol=0)


@pytest.mark.parametrize(("kind", "reference"), SMOOTH)
def test_the_default_difference_points_the_right_way_in_float32(kind: Any, reference: Any) -> None:
    module, batch = mlp_problem(), mlp_batch()
    gradient = differentiated(reference, loss_function(module, batch), flat_parameters(module))[1]
    surface = surface_of(module.float(), {name: value.float() for name, value in batch.items()})
    found = kind().value_and_gradient(surface, surface.point())[1].double()
    assert found @ gradient > 0.99 * found.norm() * gradient.norm()


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_two_products_are_enough_for_any_number_of_tasks(num_tasks: int) -> None:
    module = mlp_problem(num_tasks=num_tasks)
    surface = surface_of(module, mlp_batch(num_tasks=num_tasks))
    point = surface.point()
    for objective, cost in ((ConflictAlignment(), 2), (ConflictAlignment(terms="mean"), 1), (GradientNorm(), 1)):
        surface.forwards = surface.backwards = 0
        objective.value_and_gradient(surface, point)
        assert (surface.forwards, surface.backwards) == (cost, cost)


@pytest.mark.parametrize("derivative", ["finite_difference", "double_backward"])
def test_alignment_looks_at_the_tasks_that_have_a_gradient(derivative: Any) -> None:
    objective, batch = ConflictAlignment(derivative), mlp_batch(num_tasks=3)
    found = []
    for scales in ([1.0, 1.0, 0.0], [1.0, 1.0]):
        surface = surface_of(mlp_problem(scales=scales), batch)
        point = surface.point()
        value, gradient = objective.value_and_gradient(surface, point)
        assert value == pytest.approx(objective.value(surface, point))
        found.append((value, gradient))
    (value, gradient), (other_value, other_gradient) = found
    assert value == pytest.approx(other_value) != 0
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("derivative", ["finite_difference", "double_backward"])
@pytest.mark.parametrize("kind", [ConflictAlignment, GradientNorm])
def test_nothing_has_a_direction_where_the_mean_gradient_is_zero(kind: Any, derivative: Any) -> None:
    surface = surface_of(mlp_problem(scales=[0.0, 0.0]), mlp_batch(num_tasks=2))
    value, gradient = kind(derivative).value_and_gradient(surface, surface.point())
    assert value == 0.0
    assert not gradient.any()


def test_alignment_of_two_tasks_worked_by_hand() -> None:
    # g_0 = (1, 2), so that the cosines are 11 / (5 sqrt 5) and -1 / sqrt 5.
    point = Point(torch.zeros(2), rows([3, 4], [-1, 0]))
    assert_close(ConflictAlignment().value(None, point), -1 / math.sqrt(5))  # type: ignore[arg-type]
    assert_close(GradientNorm().value(None, point), math.sqrt(5))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- Eq. 8 - 10


class Recorded:
    """Keeps the standard normal vectors that an objective draws."""

    def __init__(self, surface: Surface) -> None:
        self.drawn: list[Tensor] = []
        self._draw = surface.standard_normal
        surface.standard_normal = self  # type: ignore[method-assign]

    def __call__(self) -> Tensor:
        self.drawn.append(self._draw())
        return self.drawn[-1]

    def take(self, radius: float) -> list[Tensor]:
        """The points on the sphere since the last call."""
        drawn, self.drawn = self.drawn, []
        return [radius * vector / vector.square().sum().sqrt() for vector in drawn]


def sharpness(losses: LossFunction, position: Tensor, norms: Tensor, noises: list[Tensor], form: str) -> Tensor:
    """Eq. 8 (difference form) and Eq. 9, with the weights of Eq. 10, written out."""
    num_tasks = len(norms)
    exponentials = (norms.sum() / norms).exp()
    weights = num_tasks * exponentials / exponentials.sum()
    values = []
    for noise in noises:
        at_noise = losses(position + noise)
        change = at_noise - losses(position) if form == "difference" else at_noise
        values.append((weights * change).mean().abs())
    return torch.stack(values).max()


@pytest.mark.parametrize("form", ["loss", "difference"])
@pytest.mark.parametrize(("num_tasks", "num_batches"), [(2, 1), (3, 2), (5, 1)])
def test_sampled_sharpness_equals_the_equations(form: Any, num_tasks: int, num_batches: int) -> None:
    module = mlp_problem(num_tasks=num_tasks)
    batches = [mlp_batch(num_tasks=num_tasks, seed=seed) for seed in range(num_batches)]
    surface, losses = surface_of(module, *batches), loss_function(module, *batches)
    recorded, radius = Recorded(surface), 0.3
    objective = SampledSharpness(form, samples=4, radius=radius)
    start = surface.point()
    norms = jacobian(losses, surface.position()).detach().norm(dim=1)
    objective.begin(surface, start)
    fixed = recorded.take(radius)
    assert len(fixed) == 4

    for shift in (0.0, 0.05):
        position = flat_parameters(module) + shift
        surface.move_to(position)
        point = Point(losses(position).detach())
        expected = sharpness(losses, position, norms, fixed, form)
        assert_close(objective.value(surface, point), expected.item(), rtol=1e-10, atol=1e-12)
        assert not recorded.drawn

        value, gradient = objective.value_and_gradient(surface, point)
        fresh = recorded.take(radius)
        assert len(fresh) == 4
        variable = position.clone().requires_grad_()
        expected = sharpness(losses, variable, norms, fresh, form)
        assert_close(value, expected.item(), rtol=1e-10, atol=1e-12)
        assert_close(gradient, torch.autograd.grad(expected, variable)[0], rtol=1e-9, atol=1e-11)
        assert torch.equal(surface.position(), position)


def test_the_sharpest_sample_may_have_the_lower_loss() -> None:
    module = mlp_problem()
    surface, losses = surface_of(module, mlp_batch()), loss_function(module, mlp_batch())
    recorded, objective = Recorded(surface), SampledSharpness("difference", samples=1, radius=0.1)
    point, position = surface.point(), surface.position()
    norms = point.gradients.norms
    objective.begin(surface, point)
    recorded.take(0.1)
    signs = set()
    for _ in range(12):
        gradient = objective.value_and_gradient(surface, point)[1]
        noises = recorded.take(0.1)
        variable = position.clone().requires_grad_()
        change = balance_weights(norms) @ (losses(variable + noises[0]) - losses(variable))
        signs.add(math.copysign(1, change.item()))
        expected = torch.autograd.grad(sharpness(losses, variable, norms, noises, "difference"), variable)[0]
        assert_close(gradient, expected, rtol=1e-9, atol=1e-11)
    assert signs == {-1.0, 1.0}


def test_sampled_sharpness_needs_no_task_gradients_but_where_it_begins() -> None:
    surface = surface_of(mlp_problem(), mlp_batch())
    objective = SampledSharpness(samples=3)
    assert not objective.uses_task_gradients
    with pytest.raises(RuntimeError, match="`begin` must be called first"):
        objective.value(surface, Point(surface.losses()))
    objective.begin(surface, surface.point())
    surface.forwards = surface.backwards = 0
    objective.value_and_gradient(surface, Point(torch.zeros(3)))
    assert (surface.forwards, surface.backwards) == (4, 1)


def test_a_teleport_begins_with_its_own_weights_and_noises() -> None:
    surface = surface_of(mlp_problem(), mlp_batch())
    point, objective = surface.point(), SampledSharpness()
    objective.begin(surface, point)
    first = objective.value(surface, point)
    assert objective.value(surface, point) == first
    objective.begin(surface, point)
    assert objective.value(surface, point) != first
    objective.begin(surface, Point(point.losses, rows([1] * 64, [2] * 64, [3] * 64)))
    weighted = objective.value(surface, point)
    assert abs(weighted - first) > 0.01 * first


# ------------------------------------------------------------------------------------------------------------ controls


def test_a_random_direction_accepts_everything_and_repeats_by_its_seed() -> None:
    surface = surface_of(mlp_problem(), mlp_batch(), seed=3)
    state, point = torch.get_rng_state(), Point(torch.zeros(3))
    objective = RandomDirection()
    value, direction = objective.value_and_gradient(surface, point)
    assert value is None
    assert objective.value(surface, point) is None
    assert not objective.uses_task_gradients
    assert torch.equal(torch.get_rng_state(), state)
    again = surface_of(mlp_problem(), mlp_batch(), seed=3)
    assert torch.equal(objective.value_and_gradient(again, point)[1], direction)
    assert not torch.equal(objective.value_and_gradient(again, point)[1], direction)
    assert (surface.forwards, surface.backwards) == (0, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConflictAlignment("double_backward"),
        lambda: GradientNorm("double_backward"),
        lambda: SampledSharpness("difference"),
        RandomDirection,
    ],
)
def test_reversed_is_the_negative(make: Any) -> None:
    answers = []
    for wrap in (lambda objective: objective, Reversed):
        surface = surface_of(mlp_problem(), mlp_batch(), seed=2)
        point, objective = surface.point(), wrap(make())
        objective.begin(surface, point)
        answers.append((objective.value(surface, point), *objective.value_and_gradient(surface, point), objective))
    (value, slope_value, slope, plain), (negative, slope_negative, slope_back, turned) = answers
    if value is None:
        assert negative is slope_negative is None
    else:
        assert (negative, slope_negative) == (-value, -slope_value)
    assert torch.equal(slope_back, -slope)
    assert turned.uses_task_gradients == plain.uses_task_gradients


def test_reversing_twice_changes_nothing() -> None:
    surface = surface_of(mlp_problem(), mlp_batch())
    point = surface.point()
    objective = ConflictAlignment("double_backward")
    value, gradient = objective.value_and_gradient(surface, point)
    twice_value, twice_gradient = Reversed(Reversed(objective)).value_and_gradient(surface, point)
    assert value == twice_value
    assert torch.equal(gradient, twice_gradient)


class Custom(Objective):
    def value(self, surface: Surface, point: Point) -> float:
        return 1.0

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[float, Tensor]:
        return 1.0, surface.position()


def test_an_objective_of_ones_own_needs_no_preparation() -> None:
    module: Problem = mlp_problem()
    surface = surface_of(module, mlp_batch())
    point = surface.point()
    objective = Reversed(Custom())
    objective.begin(surface, point)
    value, gradient = objective.value_and_gradient(surface, point)
    assert value == -1.0
    assert torch.equal(gradient, -flat_parameters(module))
    assert repr(objective) == "Reversed(Custom())"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConflictAlignment("exact"), ValueError, "`derivative` must be one of .* got 'exact'"),
        (lambda: GradientNorm("exact"), ValueError, "`derivative` must be one of .* got 'exact'"),
        (lambda: ConflictAlignment(epsilon=0.0), ValueError, "`epsilon` must be a positive number; got 0.0"),
        (lambda: GradientNorm(epsilon=math.inf), ValueError, "`epsilon` must be a positive number; got inf"),
        (lambda: ConflictAlignment(epsilon=math.nan), ValueError, "`epsilon` must be a positive number; got nan"),
        (lambda: SampledSharpness("ratio"), ValueError, "`form` must be 'loss' .* or 'difference' .* got 'ratio'"),
        (lambda: SampledSharpness(samples=0), ValueError, "`samples` must be an integer of at least 1; got 0"),
        (lambda: SampledSharpness(samples=2.0), ValueError, "`samples` must be an integer of at least 1; got 2.0"),
        (lambda: SampledSharpness(radius=-1.0), ValueError, "`radius` must be a positive number; got -1.0"),
        (lambda: Reversed("conflict"), TypeError, "`objective` must be .* got 'conflict'"),
    ],
)
def test_bad_arguments_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("kind", [ConflictAlignment, GradientNorm])
def test_an_argument_without_effect_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"`epsilon=0\.1` has no effect"):
        kind("double_backward", epsilon=0.1)
