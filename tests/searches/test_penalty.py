"""The penalty search: Eq. 11 against PEFT layers and Adam written by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_cost import LevelSetSearch, PenaltySearch
from lightning_cost._training.shared import shared_modules, shared_parameters
from lightning_cost._vectors import views
from lightning_cost.invariance import Invariance
from lightning_cost.objectives import ConflictAlignment, GradientNorm, RandomDirection, SampledSharpness
from lightning_cost.searches._adapters import PeftAdapter
from lightning_cost.surface import Surface
from tests.support.problems import (
    Problem,
    context_of,
    conv_batch,
    conv_problem,
    loss_function,
    mlp_batch,
    mlp_problem,
    surface_of,
)


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


def test_the_penalty_search_stays_where_it_is_without_an_objective() -> None:
    module = mlp_problem()
    surface = surface_of(module, mlp_batch())
    context = context_of(surface, module, RandomDirection())
    origin = surface.position()
    next(PenaltySearch(steps=4, gamma=0.0).candidates(context))
    assert torch.equal(surface.position(), origin)


def test_penalty_search_does_not_reach_recurrent_weights_and_the_level_set_does() -> None:
    module = Problem(nn.GRU(5, 4, batch_first=True), 4)
    shared = shared_parameters(module)
    assert len(LevelSetSearch().reach(shared_modules(module), shared)) == 2
    with pytest.raises(ValueError, match="reaches no weight of the shared modules"):
        PenaltySearch().reach(shared_modules(module), shared)


def test_targets_that_are_not_there_are_refused() -> None:
    module = mlp_problem()
    modules, shared = shared_modules(module), shared_parameters(module)
    found = PenaltySearch(adapter=LoraConfig(r=2, target_modules=["2"])).reach(modules, shared)
    assert found == [module.backbone[2].weight]
    with pytest.raises(ValueError, match="`target_modules` names '7', but no shared module has this name"):
        PenaltySearch(adapter=LoraConfig(r=2, target_modules=["7"])).reach(modules, shared)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", [0, 1.0]),
        ("lr", [0, -0.1, math.nan]),
        ("gamma", [-0.1, math.nan]),
        ("backtracks", [-1, 0.5]),
        ("shrink", [0, 1, math.nan]),
    ],
)
def test_bad_arguments_are_refused(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must .* got {re.escape(repr(value))}"):
            PenaltySearch(**{name: value})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: PenaltySearch(backtracks=0, shrink=0.5), "shrink=0.5"),
        (lambda: PenaltySearch(invariance_weight=0, relative=False), "relative=False"),
    ],
)
def test_an_argument_without_effect_is_refused(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` has no effect"):
        make()
