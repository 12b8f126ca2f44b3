"""The level set search: where it steps, how far, and what it refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.testing import assert_close

from lightning_cost import LevelSetSearch, PenaltySearch
from lightning_cost._training.shared import shared_modules, shared_parameters
from lightning_cost._vectors import views
from lightning_cost.invariance import Invariance, LevelSet
from lightning_cost.objectives import Objective
from lightning_cost.searches._adapters import low_rank
from lightning_cost.surface import Point, Surface
from tests.support.problems import (
    context_of,
    conv_batch,
    conv_problem,
    flat_parameters,
    gradients_of,
    jacobian,
    loss_function,
    mlp_batch,
    mlp_problem,
    surface_of,
)


class Fixed(Objective):
    """An objective whose gradient is given."""

    uses_task_gradients = False

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def value(self, surface: Surface, point: Point) -> None:
        return

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[None, Tensor]:
        return None, self.gradient


def visited(surface: Surface) -> list[Tensor]:
    """Every place that the surface is moved by a vector to from now on."""
    places: list[Tensor] = []
    move_by = surface.move_by

    def spy(vector: Tensor, scale: float = 1.0) -> None:
        assert not vector.requires_grad
        move_by(vector, scale)
        places.append(surface.position())

    surface.move_by = spy  # type: ignore[method-assign]
    return places


@pytest.mark.parametrize("full_rank", [False, True])
@pytest.mark.parametrize("invariance", ["per_task", "mean"])
@pytest.mark.parametrize(("problem", "batch"), [(mlp_problem, mlp_batch), (conv_problem, conv_batch)])
def test_candidates_step_along_the_tangent_and_retract(
    problem: Any, batch: Any, invariance: Invariance, full_rank: bool
) -> None:
    module = problem()
    surface, losses = surface_of(module, batch()), loss_function(module, batch())
    gradient, origin = surface.standard_normal(), flat_parameters(module)
    context = context_of(surface, module, Fixed(gradient), invariance=invariance)
    matrix, before = jacobian(losses, origin).detach(), losses(origin).detach()
    level_set = LevelSet(gradients_of(matrix), invariance)
    weights = [p for p in module.backbone.parameters() if p.ndim > 1]
    direction = level_set.tangent(gradient)
    scale = origin.norm()
    if not full_rank:
        direction = low_rank(direction, surface.shared, weights, 1)
        scale = torch.stack([p.detach().norm() for p in weights]).norm()

    rank = {"full_rank": True} if full_rank else {"rank": 1}
    search = LevelSetSearch(size=0.03, backtracks=2, shrink=0.5, **rank)
    places = visited(surface)
    arrived = [surface.position() for _ in search.candidates(context)]

    assert len(arrived) == 3
    assert len(places) == 6
    for index, (stepped, retracted) in enumerate(zip(places[::2], places[1::2], strict=True)):
        step = stepped - origin
        assert_close(step.norm(), 0.03 * 0.5**index * scale, rtol=1e-9, atol=0)
        assert_close(step / step.norm(), direction / direction.norm(), rtol=1e-8, atol=1e-10)
        residuals = losses(stepped).detach() - before
        assert_close(retracted - stepped, level_set.retraction(residuals), rtol=1e-8, atol=1e-12)
        assert torch.equal(arrived[index], retracted)
    ranks = [
        int(torch.linalg.matrix_rank(view.reshape(len(view), -1), rtol=1e-8))
        for view in views(places[0] - origin, surface.shared)
        if view.ndim > 1
    ]
    assert all(rank > 1 for rank in ranks) if full_rank else ranks == [1] * len(weights)


class Aimed(Fixed):
    """An objective that is content with less than the longest step."""

    def __init__(self, gradient: Tensor, wanted: float) -> None:
        super().__init__(gradient)
        self.wanted = wanted

    def aim(self, value: float) -> float:
        return value + self.wanted

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[float, Tensor]:  # type: ignore[override]
        return -0.3, self.gradient


@pytest.mark.parametrize("full_rank", [False, True])
@pytest.mark.parametrize(("wanted", "reaches"), [(1e-4, True), (1e4, False)])
def test_the_step_is_as_long_as_the_objective_needs(wanted: float, reaches: bool, full_rank: bool) -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch())
    gradient, origin = surface.standard_normal(), surface.position()
    lengths, gains = [], []
    for objective in (Aimed(gradient, wanted), Fixed(gradient)):
        surface.move_to(origin)
        context = context_of(surface, module, objective)
        tangent = LevelSet(context.start.gradients, "per_task").tangent(gradient)
        places = visited(surface)
        next(LevelSetSearch(size=0.03, full_rank=full_rank).candidates(context))
        lengths.append((places[0] - origin).norm())
        gains.append(tangent @ (places[0] - origin))
    assert_close(gains[0], torch.tensor(wanted).double() if reaches else gains[1], rtol=1e-6, atol=0)
    assert (lengths[0] < lengths[1]) == reaches


def test_level_set_search_has_nothing_to_try_without_a_direction() -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch())
    zero = torch.zeros(surface.num_parameters, dtype=torch.float64)
    for full_rank in (False, True):
        context = context_of(surface, module, Fixed(zero))
        assert list(LevelSetSearch(full_rank=full_rank).candidates(context)) == []


@pytest.mark.parametrize("full_rank", [False, True])
@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0], [1.0, 1e4, 1e-4]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_direction(dtype: torch.dtype, scales: list[float], full_rank: bool) -> None:
    module = mlp_problem(scales=scales).to(dtype)
    surface = surface_of(module, {name: value.to(dtype) for name, value in mlp_batch().items()})
    span = surface.point().gradients.matrix.clone()
    search = LevelSetSearch(full_rank=full_rank)
    for gradient in (span[0] - 3 * span[1], span[1] - span[2], *span):
        context = context_of(surface, module, Fixed(gradient))
        assert list(search.candidates(context)) == []
    nearly = span[0] + 1e-3 * span[0].norm() * torch.nn.functional.normalize(surface.standard_normal(), dim=0)
    context = context_of(surface, module, Fixed(nearly))
    assert list(search.candidates(context)) != []


def test_the_step_has_no_graph() -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch())
    places = visited(surface)
    context = context_of(surface, module, Fixed(surface.standard_normal()))
    list(LevelSetSearch().candidates(context))
    assert places


def test_targets_that_are_not_there_are_refused() -> None:
    module = mlp_problem()
    modules, shared = shared_modules(module), shared_parameters(module)
    assert LevelSetSearch(target_modules=["2"]).reach(modules, shared) == [module.backbone[2].weight]
    with pytest.raises(ValueError, match=r"`target_modules` names '7', but no shared module has this name"):
        LevelSetSearch(target_modules=["7"]).reach(modules, shared)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rank", [0, 1.0, True]),
        ("target_modules", [[], "", [1]]),
        ("size", [0, -1.0, math.nan]),
        ("steps", [0, 1.0]),
        ("backtracks", [-1, 0.5]),
        ("shrink", [0, 1, 1.5, math.nan]),
    ],
)
def test_bad_arguments_are_refused(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must .* got {re.escape(repr(value))}"):
            LevelSetSearch(**{name: value})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LevelSetSearch(rank=3, full_rank=True), "rank=3"),
        (lambda: LevelSetSearch(target_modules=["0"], full_rank=True), r"target_modules=\['0'\]"),
        (lambda: LevelSetSearch(backtracks=0, shrink=0.5), "shrink=0.5"),
    ],
)
def test_an_argument_without_effect_is_refused(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` has no effect"):
        make()


@pytest.mark.parametrize(
    "targets", [None, ["0"], ["backbone.2", "0"], r".*\.2", "all-linear"], ids=lambda targets: str(targets)
)
def test_target_modules_mean_what_they_mean_in_peft(targets: Any) -> None:
    module = mlp_problem()
    modules, shared = shared_modules(module), shared_parameters(module)
    by_peft = PenaltySearch(adapter=LoraConfig(target_modules=targets)).reach(modules, shared)
    assert list(map(id, LevelSetSearch(target_modules=targets).reach(modules, shared))) == list(map(id, by_peft))
