"""How to move: the level set to first and second order, Eq. 7, and Eq. 11 against PEFT layers and Adam by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_cost import LevelSetSearch, PenaltySearch, TaskGradients
from lightning_cost._training.shared import shared_modules, shared_parameters
from lightning_cost._vectors import views
from lightning_cost.invariance import Invariance, LevelSet, drift, loss_fluctuation, loss_fluctuation_weights
from lightning_cost.objectives import ConflictAlignment, GradientNorm, Objective, RandomDirection, SampledSharpness
from lightning_cost.searches import SearchContext
from lightning_cost.searches._adapters import PeftAdapter, low_rank
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
    rows,
    surface_of,
)

RANDOM = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
VECTOR = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients_of(matrix: Tensor) -> TaskGradients:
    return TaskGradients([f"task{i}" for i in range(len(matrix))], matrix)


# ---------------------------------------------------------------------------------------------------------------- Eq. 7

LOSSES = torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64)
REFERENCE = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("relative", "invariance", "value", "weights"),
    [
        (False, "per_task", 4 / 3, [1 / 3, -1 / 3, 1 / 3]),
        (True, "per_task", 2 / 3, [1 / 6, -1 / 6, 1 / 6]),
        (False, "mean", 2 / 3, [1 / 3, 1 / 3, 1 / 3]),
        (True, "mean", 1 / 3, [1 / 6, 1 / 6, 1 / 6]),
    ],
)
def test_loss_fluctuation_worked_by_hand(
    relative: bool, invariance: Invariance, value: float, weights: list[float]
) -> None:
    assert_close(loss_fluctuation(LOSSES, REFERENCE, invariance, relative=relative).item(), value)
    found = loss_fluctuation_weights(LOSSES, REFERENCE, invariance, relative=relative)
    assert_close(found, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("invariance", ["per_task", "mean"])
def test_weights_of_the_fluctuation_are_its_derivative(relative: bool, invariance: Invariance) -> None:
    losses = torch.tensor([1.3, -0.4, 7.0, 2.0], dtype=torch.float64)
    reference = torch.tensor([1.0, -0.5, 9.0, 2.5], dtype=torch.float64)
    with torch.no_grad():
        weights = loss_fluctuation_weights(losses, reference, invariance, relative=relative)
    for i, unit in enumerate(torch.eye(4, dtype=torch.float64)):
        values = [
            loss_fluctuation(losses + step * unit, reference, invariance, relative=relative) for step in (1e-6, -1e-6)
        ]
        assert_close((values[0] - values[1]) / 2e-6, weights[i], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("invariance", ["per_task", "mean"])
def test_fluctuation_is_zero_and_flat_where_it_starts(relative: bool, invariance: Invariance) -> None:
    reference = torch.tensor([0.0, 2.0, -1.0])
    assert loss_fluctuation(reference, reference, invariance, relative=relative) == 0
    assert not loss_fluctuation_weights(reference, reference, invariance, relative=relative).any()


@pytest.mark.parametrize(
    ("losses", "reference", "per_task", "mean"),
    [
        ([1.1, 2.0], [1.0, 2.0], 0.1, 0.1 / 3),
        ([1.1, 1.9], [1.0, 2.0], 0.1, 0.0),
        ([-1.5, 2.0], [-1.0, 2.0], 0.5, 0.5),
        ([0.0, 1.0], [0.0, 1.0], 0.0, 0.0),
        ([0.1, 1.0], [0.0, 1.0], math.inf, 0.1),
        ([math.inf, 1.0], [1.0, 1.0], math.inf, math.inf),
        ([math.nan, 1.0], [1.0, 1.0], math.nan, math.nan),
    ],
)
def test_drift_worked_by_hand(losses: list[float], reference: list[float], per_task: float, mean: float) -> None:
    tensors = torch.tensor(losses, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    assert drift(*tensors, "per_task") == pytest.approx(per_task, abs=1e-15, nan_ok=True)
    assert drift(*tensors, "mean") == pytest.approx(mean, abs=1e-15, nan_ok=True)


# ------------------------------------------------------------------------------------------------------------ level set


def directional_derivatives(matrix: Tensor, step: Tensor) -> Tensor:
    """Relative to what a step straight up each task gradient would give."""
    return (matrix @ step) / (matrix.norm(dim=1) * step.norm()).clamp_min(1e-300)


@pytest.mark.parametrize(
    "scales",
    [[1.0, 1.0, 1.0], [1.0, 1e6, 1e-6], [1e-12, 1.0, 1.0]],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_held_loss_moves_along_the_tangent(scales: list[float], dtype: torch.dtype) -> None:
    matrix = (RANDOM * torch.tensor(scales, dtype=torch.float64)[:, None]).to(dtype)
    tangent = LevelSet(gradients_of(matrix), "per_task").tangent(VECTOR.to(dtype))
    assert tangent.dtype == dtype
    assert directional_derivatives(matrix, tangent).abs().max() < 100 * torch.finfo(dtype).eps
    orthonormal = torch.linalg.qr(RANDOM.T)[0]
    expected = VECTOR - orthonormal @ (orthonormal.T @ VECTOR)
    assert_close(tangent.double(), expected, rtol=0, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0], [1.0, 1e6, 1e-6]])
def test_retraction_is_the_smallest_step_that_undoes_the_residuals(scales: list[float]) -> None:
    matrix = RANDOM * torch.tensor(scales, dtype=torch.float64)[:, None]
    residuals = torch.tensor([0.3, -2.0, 0.01], dtype=torch.float64) * torch.tensor(scales, dtype=torch.float64)
    step = LevelSet(gradients_of(matrix), "per_task").retraction(residuals)
    assert_close(matrix @ step, -residuals, rtol=1e-9, atol=0)
    orthonormal = torch.linalg.qr(RANDOM.T)[0]
    assert_close(orthonormal @ (orthonormal.T @ step), step, rtol=1e-9, atol=1e-12 * float(step.norm()))


def test_holding_the_mean_leaves_every_other_direction() -> None:
    level_set, mean = LevelSet(gradients_of(RANDOM), "mean"), RANDOM.mean(dim=0)
    tangent = level_set.tangent(VECTOR)
    assert_close(tangent, VECTOR - mean * (mean @ VECTOR) / (mean @ mean), rtol=1e-10, atol=1e-12)
    assert (RANDOM @ tangent).abs().min() > 0.1
    residuals = torch.tensor([0.5, -0.1, 0.2], dtype=torch.float64)
    assert_close(level_set.retraction(residuals), -0.2 * mean / (mean @ mean), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "residuals", "undone"),
    [
        # Twice the same task, the same direction at another scale, the opposite one.
        (RANDOM[[0, 0, 1]], [0.2, 0.2, -1.0], [0.2, 0.2, -1.0]),
        (RANDOM[[0, 0, 1]] * torch.tensor([[1.0], [1e3], [1.0]]), [0.2, 200.0, -1.0], [0.2, 200.0, -1.0]),
        (RANDOM[[0, 0, 1]] * torch.tensor([[1.0], [-1.0], [1.0]]), [0.2, -0.2, -1.0], [0.2, -0.2, -1.0]),
        # Residuals that no step can undo are undone on average.
        (RANDOM[[0, 0, 1]], [0.2, 0.4, -1.0], [0.3, 0.3, -1.0]),
        # A task without gradient can neither be moved nor be in the way.
        (RANDOM * torch.tensor([[1.0], [0.0], [1.0]]), [0.2, 5.0, -1.0], [0.2, 0.0, -1.0]),
        (torch.zeros(3, 40, dtype=torch.float64), [0.2, 5.0, -1.0], [0.0, 0.0, 0.0]),
    ],
)
def test_degenerate_task_gradients(matrix: Tensor, residuals: list[float], undone: list[float]) -> None:
    level_set = LevelSet(gradients_of(matrix), "per_task")
    tangent = level_set.tangent(VECTOR)
    assert directional_derivatives(matrix, tangent).abs().max() < 1e-12
    # Nothing is taken away but the span of the rows.
    span = torch.linalg.svd(matrix, full_matrices=False)
    basis = span.Vh[span.S.gt(1e-9 * span.S.max())]
    assert_close(tangent, VECTOR - basis.T @ (basis @ VECTOR), rtol=1e-8, atol=1e-10)
    step = level_set.retraction(torch.tensor(residuals, dtype=torch.float64))
    assert_close(matrix @ step, -torch.tensor(undone, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**31),
    st.integers(2, 6),
    st.lists(st.floats(-6, 6), min_size=6, max_size=6),
    st.sampled_from(["per_task", "mean"]),
)
def test_tangents_of_any_tasks_hold_what_is_held(
    seed: int, num_tasks: int, exponents: list[float], invariance: Invariance
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.tensor(exponents[:num_tasks], dtype=torch.float64)
    matrix = scales[:, None] * torch.randn(num_tasks, 12, generator=generator, dtype=torch.float64)
    vector = torch.randn(12, generator=generator, dtype=torch.float64)
    level_set = LevelSet(gradients_of(matrix), invariance)
    tangent = level_set.tangent(vector)
    held = matrix if invariance == "per_task" else matrix.mean(dim=0, keepdim=True)
    assert (held @ tangent).abs().le(1e-9 * held.norm(dim=1) * vector.norm()).all()
    assert_close(level_set.tangent(tangent), tangent, rtol=1e-6, atol=1e-9)


def test_losses_leave_the_level_set_by_second_order_and_return_to_third() -> None:
    module = mlp_problem()
    losses, position = loss_function(module, mlp_batch()), flat_parameters(module)
    matrix = jacobian(losses, position).detach()
    level_set, before = LevelSet(gradients_of(matrix), "per_task"), losses(position).detach()
    direction = torch.randn(len(position), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tangent = level_set.tangent(direction)
    left, returned = [], []
    for size in (1e-2, 5e-3):
        residuals = losses(position + size * tangent).detach() - before
        left.append(residuals.norm())
        arrived = position + size * tangent + level_set.retraction(residuals)
        returned.append((losses(arrived).detach() - before).norm())
    assert returned[0] < 0.1 * left[0]
    assert_close(left[0] / left[1], torch.tensor(4.0, dtype=torch.float64), rtol=0.1, atol=0)
    assert_close(returned[0] / returned[1], torch.tensor(8.0, dtype=torch.float64), rtol=0.15, atol=0)


class Fixed(Objective):
    """An objective whose gradient is given."""

    uses_task_gradients = False

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def value(self, surface: Surface, point: Point) -> None:
        return

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[None, Tensor]:
        return None, self.gradient


def context_of(surface: Surface, module: Problem, objective: Objective, **kwargs: Any) -> SearchContext:
    start = surface.point()
    objective.begin(surface, start)
    defaults: dict[str, Any] = {
        "surface": surface,
        "start": start,
        "objective": objective,
        "invariance": "per_task",
        "modules": shared_modules(module),
        "learning_rate": 0.01,
        "record": lambda stage, **figures: None,
    }
    return SearchContext(**{**defaults, **kwargs})


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda targets: LevelSetSearch(target_modules=targets), r"`target_modules=\['7'\]` reaches no weight"),
        (
            lambda targets: PenaltySearch(adapter=LoraConfig(r=2, target_modules=targets)),
            r"`adapter` \(LoraConfig, target_modules={'7'}\) reaches no weight",
        ),
    ],
)
def test_searches_refuse_targets_that_are_not_there(make: Any, message: str) -> None:
    module = mlp_problem()
    modules, shared = shared_modules(module), shared_parameters(module)
    assert make(["2"]).reach(modules, shared) == [module.backbone[2].weight]
    with pytest.raises(ValueError, match=message):
        make(["7"]).reach(modules, shared)


def test_penalty_search_does_not_reach_recurrent_weights_and_the_level_set_does() -> None:
    module = Problem(nn.GRU(5, 4, batch_first=True), 4)
    shared = shared_parameters(module)
    assert len(LevelSetSearch().reach(shared_modules(module), shared)) == 2
    with pytest.raises(ValueError, match="reaches no weight of the shared modules"):
        PenaltySearch().reach(shared_modules(module), shared)


# --------------------------------------------------------------------------------------------------------------- Eq. 11


class Drawn:
    """Keeps the standard normal vectors that a search draws."""

    def __init__(self, surface: Surface) -> None:
        self.drawn: list[Tensor] = []
        self._draw = surface.standard_normal
        surface.standard_normal = self  # type: ignore[method-assign]

    def __call__(self) -> Tensor:
        self.drawn.append(self._draw())
        return self.drawn[-1]


class WithPeft:
    """A copy of a problem with PEFT layers in it, whose losses autograd differentiates through those layers."""

    def __init__(self, module: Problem, config: PeftConfig, initial: Sequence[Tensor], make: Any) -> None:
        copy = make()
        copy.load_state_dict(module.state_dict())
        self.module = inject_adapter_in_model(config, copy.backbone) and copy
        self.base = [p for n, p in copy.backbone.named_parameters() if ".lora_" not in n]
        self.adapter = [p for n, p in copy.backbone.named_parameters() if ".lora_" in n]
        for parameter in self.base:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for parameter, value in zip(self.adapter, initial, strict=True):
                parameter.copy_(value)

    def losses(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """The task losses, with noise on the weights and biases below the adapter."""
        if noise is None:
            return self.module(batch)
        values = noise.split([p.numel() for p in self.base])
        names = [n for n, _ in self.module.named_parameters() if n.startswith("backbone.") and ".lora_" not in n]
        moved = {n: p + v.view(p.shape) for n, p, v in zip(names, self.base, values, strict=True)}
        return torch.func.functional_call(self.module, moved, (batch,))

    def task_gradients(self, batch: dict[str, Tensor]) -> Tensor:
        pieces = [torch.autograd.grad(loss, self.base, create_graph=True) for loss in self.losses(batch)]
        return torch.stack([torch.cat([g.reshape(-1) for g in gradients]) for gradients in pieces])

    def merged(self) -> Tensor:
        """The shared parameters after PEFT's own merge."""
        for layer in self.module.backbone.modules():
            if hasattr(layer, "merge"):
                layer.merge()
        return torch.cat([p.detach().reshape(-1) for p in self.base])


def objective_through_peft(
    name: str, reference: WithPeft, batch: dict[str, Tensor], weights: Tensor, noises: list[Tensor], radius: float
) -> Tensor:
    if name == "conflict":
        matrix = reference.task_gradients(batch)
        mean = matrix.mean(dim=0)
        return torch.stack([row @ mean / row.norm() / mean.norm() for row in matrix]).min()
    if name == "gradient_norm":
        return reference.task_gradients(batch).mean(dim=0).norm()
    values = []
    for noise in noises:
        values.append((weights * reference.losses(batch, radius * noise / noise.norm())).mean())
        if name == "difference":
            values[-1] = values[-1] - (weights * reference.losses(batch)).mean()
    return torch.stack(values).abs().max()


OBJECTIVES: dict[str, Any] = {
    "loss": lambda: SampledSharpness("loss", samples=3, radius=0.2),
    "difference": lambda: SampledSharpness("difference", samples=3, radius=0.2),
    "conflict": lambda: ConflictAlignment("double_backward"),
    "gradient_norm": lambda: GradientNorm("double_backward"),
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize(
    ("problem", "batch"), [(mlp_problem, mlp_batch), (conv_problem, conv_batch)], ids=["linear", "conv2d"]
)
@pytest.mark.parametrize(
    ("steps", "relative", "invariance", "lora_alpha"),
    [(1, False, "per_task", 2), (4, False, "per_task", 5), (4, True, "mean", 2)],
)
def test_penalty_search_equals_adam_on_peft_layers(
    name: str, problem: Any, batch: Any, steps: int, relative: bool, invariance: Invariance, lora_alpha: int
) -> None:
    module, data, gamma, lr = problem(), batch(), 0.3, 0.01
    surface = surface_of(module, data, seed=5)
    config = LoraConfig(r=2, lora_alpha=lora_alpha)
    context = context_of(surface, module, OBJECTIVES[name](), invariance=invariance)
    origin, before = surface.position(), context.start.losses
    same = torch.Generator()
    same.set_state(surface.generator.get_state())
    initial = [p.detach() for p in PeftAdapter(context.modules, surface.shared, config, same).parameters]
    drawn = Drawn(surface)
    search = PenaltySearch(config, steps=steps, lr=lr, gamma=gamma, relative=relative)
    next(search.candidates(context))
    found = surface.position()

    targeted = LoraConfig(r=2, lora_alpha=lora_alpha, target_modules=["0", "2"])
    reference = WithPeft(problem(), targeted, initial, problem)
    norms = context.start.gradients.norms
    weights = len(norms) * torch.softmax(norms.sum() / norms, dim=0)
    first = [torch.zeros_like(p) for p in reference.adapter]
    second = [torch.zeros_like(p) for p in reference.adapter]
    for step in range(1, steps + 1):
        losses = reference.losses(data)
        change, base = losses - before, before
        if invariance == "mean":
            change, base = change.mean(dim=0, keepdim=True), before.mean(dim=0, keepdim=True)
        fluctuation = (change.abs() / base if relative else change.abs()).mean()
        noises = drawn.drawn[3 * (step - 1) : 3 * step]
        objective = objective_through_peft(name, reference, data, weights, noises, 0.2)
        gradients = torch.autograd.grad(fluctuation - gamma * objective, reference.adapter)
        with torch.no_grad():
            for p, g, m, v in zip(reference.adapter, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.sub_(lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    assert (found - origin).norm() > 1e-4
    assert_close(found, reference.merged(), rtol=0, atol=1e-8)
    assert len(drawn.drawn) == (3 * steps if name in ("loss", "difference") else 0)


def test_penalty_search_takes_the_learning_rate_of_training() -> None:
    found = []
    for lr, learning_rate in ((None, 0.02), (0.02, 0.5)):
        module = mlp_problem()
        surface = surface_of(module, mlp_batch(), seed=5)
        context = context_of(surface, module, SampledSharpness(), learning_rate=learning_rate)
        next(PenaltySearch(steps=3, lr=lr).candidates(context))
        found.append(surface.position())
    assert torch.equal(found[0], found[1])


def test_penalty_search_shortens_a_refused_change() -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch())
    context = context_of(surface, module, SampledSharpness())
    origin = surface.position()
    search = PenaltySearch(steps=3, backtracks=2, shrink=0.25)
    changes = [surface.position() - origin for _ in search.candidates(context)]
    assert len(changes) == 3
    assert_close(changes[1], 0.25 * changes[0], rtol=1e-9, atol=1e-12)
    assert_close(changes[2], 0.0625 * changes[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("config", [LoraConfig(r=2), LoHaConfig(r=2), LoKrConfig(r=2)], ids=lambda c: c.peft_type)
@pytest.mark.parametrize(
    ("problem", "batch"), [(mlp_problem, mlp_batch), (conv_problem, conv_batch)], ids=["linear", "conv2d"]
)
def test_penalty_search_lowers_what_it_minimizes(config: PeftConfig, problem: Any, batch: Any) -> None:
    module = problem()
    surface = surface_of(module, batch())
    figures: list[dict[str, Any]] = []
    objective = ConflictAlignment("double_backward")
    context = context_of(
        surface, module, objective, record=lambda stage, **row: figures.append({"stage": stage, **row})
    )
    origin, gamma = surface.position(), 1.0
    next(PenaltySearch(config, steps=25, lr=0.003, gamma=gamma).candidates(context))
    for view in views(surface.position() - origin, surface.shared):
        assert bool(view.any()) == (view.ndim > 1)
    assert [row["stage"] for row in figures] == ["search"] * 25
    penalized = [float(row["loss_fluctuation"]) - gamma * row["objective"] for row in figures]
    assert figures[0]["loss_fluctuation"] == 0
    assert penalized[-1] < penalized[0]
    assert figures[-1]["objective"] > figures[0]["objective"]


def test_penalty_search_traces_what_it_evaluates() -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch())
    losses, places = loss_function(module, mlp_batch()), []
    figures: list[dict[str, Any]] = []

    def record(stage: str, **row: Any) -> None:
        figures.append(row)
        places.append(surface.position())

    context = context_of(surface, module, SampledSharpness(), record=record)
    list(PenaltySearch(steps=3, relative=False).candidates(context))
    for row, place in zip(figures, places, strict=True):
        expected = losses(place).detach()
        assert_close(row["losses"], expected)
        assert_close(float(row["loss_fluctuation"]), float((expected - context.start.losses).abs().mean()))


def test_without_an_objective_the_penalty_search_stays() -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch())
    context = context_of(surface, module, RandomDirection())
    origin = surface.position()
    next(PenaltySearch(steps=4, gamma=0.0).candidates(context))
    assert torch.equal(surface.position(), origin)


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (LevelSetSearch, "rank", [0, 1.0, True]),
        (LevelSetSearch, "target_modules", [[], "", [1]]),
        (LevelSetSearch, "size", [0, -1.0, math.nan]),
        (LevelSetSearch, "steps", [0, 1.0]),
        (LevelSetSearch, "backtracks", [-1, 0.5]),
        (LevelSetSearch, "shrink", [0, 1, 1.5, math.nan]),
        (PenaltySearch, "steps", [0, 1.0]),
        (PenaltySearch, "lr", [0, -0.1, math.nan]),
        (PenaltySearch, "gamma", [-0.1, math.nan]),
        (PenaltySearch, "backtracks", [-1, 0.5]),
        (PenaltySearch, "shrink", [0, 1, math.nan]),
    ],
)
def test_bad_arguments_are_refused(kind: Any, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must .* got {re.escape(repr(value))}"):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LevelSetSearch(rank=3, full_rank=True), "rank=3"),
        (lambda: LevelSetSearch(target_modules=["0"], full_rank=True), r"target_modules=\['0'\]"),
        (lambda: LevelSetSearch(backtracks=0, shrink=0.5), "shrink=0.5"),
        (lambda: PenaltySearch(backtracks=0, shrink=0.5), "shrink=0.5"),
        (lambda: PenaltySearch(invariance_weight=0, relative=False), "relative=False"),
        (lambda: ConflictAlignment("double_backward", epsilon=0.1), "epsilon=0.1"),
        (lambda: GradientNorm("double_backward", epsilon=0.1), "epsilon=0.1"),
    ],
)
def test_an_argument_without_effect_is_refused(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` has no effect"):
        make()


@pytest.mark.parametrize(
    "targets", [None, ["0"], ["backbone.2", "9"], r".*\.2", "all-linear"], ids=lambda targets: str(targets)
)
def test_target_modules_mean_what_they_mean_in_peft(targets: Any) -> None:
    module = mlp_problem()
    modules, shared = shared_modules(module), shared_parameters(module)
    by_peft = PenaltySearch(adapter=LoraConfig(target_modules=targets)).reach(modules, shared)
    assert list(map(id, LevelSetSearch(target_modules=targets).reach(modules, shared))) == list(map(id, by_peft))


def test_task_gradients_may_be_given_number_by_number() -> None:
    # Holding x and x + y leaves nothing of the plane; holding their mean (x + y / 2) leaves (1, -2).
    gradients, vector = rows([1, 0], [1, 1]), torch.tensor([5.0, 5.0], dtype=torch.float64)
    assert_close(LevelSet(gradients, "per_task").tangent(vector), torch.zeros(2, dtype=torch.float64))
    assert_close(LevelSet(gradients, "mean").tangent(vector), torch.tensor([-1.0, 2.0], dtype=torch.float64))
