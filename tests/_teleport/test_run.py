"""A teleport without a Trainer: what it takes, what it leaves, and what it costs in copies."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cost import (
    ConflictAlignment,
    LevelSetSearch,
    Objective,
    Outcome,
    PenaltySearch,
    Point,
    RandomDirection,
    SampledSharpness,
    SearchContext,
    Surface,
    Teleporter,
)
from lightning_cost._teleport.run import trajectory_similarity
from tests.support.problems import mlp_batch


class Plain(nn.Module):
    """Two layers and three heads, no LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
            self.heads = nn.Linear(4, 3).double()
        self.batch = mlp_batch()

    def losses(self) -> dict[str, Tensor]:
        errors = (self.heads(self.backbone(self.batch["x"]).tanh()) - self.batch["y"]).square().mean(dim=0)
        return dict(zip(("left", "right", "ink"), errors, strict=True))

    def surface(self) -> Surface:
        return Surface(self.losses, list(self.backbone.parameters()), list(self.parameters()))


def state(module: nn.Module) -> list[Tensor | None]:
    values = [parameter.detach().clone() for parameter in module.parameters()]
    return values + [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def assert_same_state(one: list[Tensor | None], two: list[Tensor | None]) -> None:
    for first, second in zip(one, two, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)


@pytest.mark.parametrize(
    "teleporter",
    [
        Teleporter(),
        Teleporter(search=LevelSetSearch(steps=3)),
        Teleporter(search=LevelSetSearch(full_rank=True)),
        Teleporter(search=PenaltySearch(steps=20, lr=1e-2)),
        Teleporter(RandomDirection()),
        Teleporter(SampledSharpness(form="difference"), invariance="mean"),
    ],
    ids=["default", "3 steps", "full rank", "penalty", "random", "sharpness"],
)
def test_an_accepted_teleport_holds_the_losses_and_leaves_the_gradients_of_the_new_point(
    teleporter: Teleporter,
) -> None:
    module = Plain()
    before = module.losses()
    outcome = teleporter.run(module.surface(), {"backbone": module.backbone})
    assert outcome.accepted
    after = module.losses()
    changes = torch.stack([(after[name] - before[name]) / before[name] for name in before])
    if teleporter.invariance == "per_task":
        assert changes.abs().max() <= 0.02
    torch.testing.assert_close(outcome.end.losses, torch.stack(list(after.values())).detach(), rtol=1e-9, atol=0)
    mean = torch.stack(list(after.values())).mean()
    for parameter, expected in zip(
        module.parameters(), torch.autograd.grad(mean, list(module.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-10)
    assert outcome.forwards > 0
    assert outcome.backwards > 0
    assert outcome.trace[0]["stage"] == "start"


def test_undo_goes_back_after_a_teleport() -> None:
    module = Plain()
    surface = module.surface()
    start = surface.point()
    before = state(module)
    outcome = Teleporter().run(surface, {"backbone": module.backbone}, start)
    assert outcome.accepted
    assert not torch.equal(module.backbone[0].weight, before[0])
    outcome.undo()
    assert_same_state(state(module), before)


class Refusing(ConflictAlignment):
    """Says of every candidate but the first few that it is no better."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.good = good

    def value(self, surface: Surface, point: Point) -> float:
        self.good -= 1
        return super().value(surface, point) if self.good >= 0 else -2.0


@pytest.mark.parametrize("known", [False, True])
def test_a_refused_teleport_changes_nothing(known: bool) -> None:
    module = Plain()
    surface = module.surface()
    start = surface.point()
    before = state(module)
    outcome = Teleporter(Refusing(1)).run(surface, {"backbone": module.backbone}, start if known else None)
    assert not outcome.accepted
    assert "does not grow" in outcome.reason
    if known:
        assert_same_state(state(module), before)
        assert outcome.end is start


def test_a_refused_second_step_keeps_the_first() -> None:
    one, two = Plain(), Plain()
    for module, steps, good in ((one, 1, 2), (two, 4, 2)):
        teleporter = Teleporter(Refusing(good), LevelSetSearch(steps=steps))
        outcome = teleporter.run(module.surface(), {"backbone": module.backbone})
        assert outcome.accepted
    assert_same_state(state(two), state(one))


@pytest.mark.parametrize("error", [RuntimeError("fault"), KeyboardInterrupt()])
def test_an_exception_in_the_losses_leaves_everything_as_it_was(error: BaseException) -> None:
    module = Plain()
    surface = module.surface()
    start = surface.point()
    before, losses = state(module), module.losses
    for call in range(1, 5):
        remaining = iter(range(call))

        def fails(remaining: Any = remaining) -> dict[str, Tensor]:
            if next(remaining, None) is None:
                raise error
            return losses()

        surface._batches = [fails]
        with pytest.raises(type(error)):
            Teleporter(search=LevelSetSearch(steps=2)).run(surface, {"backbone": module.backbone}, start)
        assert_same_state(state(module), before)


class Copies(Surface):
    """Counts copies of the shared parameters, and how many there are at a time."""

    copies = 0
    most = 0

    def flatten(self, tensors: Any) -> Tensor:
        copy, values = super().flatten(tensors), {parameter.data_ptr() for parameter in self.shared}
        if all(tensor is not None and tensor.data_ptr() in values for tensor in tensors):
            self.copies += 1
            self.alive = [*(known for known in getattr(self, "alive", []) if known() is not None), weakref.ref(copy)]
            self.most = max(self.most, len(self.alive))
        return copy


@pytest.mark.parametrize(
    ("search", "objective", "copies"),
    [
        (LevelSetSearch(), ConflictAlignment(), 2),
        (LevelSetSearch(full_rank=True), ConflictAlignment(), 2),
        (PenaltySearch(steps=20, lr=1e-2), ConflictAlignment("double_backward"), 2),
        (LevelSetSearch(steps=3), ConflictAlignment(), 2),
    ],
    ids=["default", "full rank", "penalty", "3 steps"],
)
def test_an_accepted_teleport_holds_two_copies_of_the_shared_parameters_at_most(
    search: Any, objective: Objective, copies: int
) -> None:
    module = Plain()
    surface = Copies(module.losses, list(module.backbone.parameters()), list(module.parameters()))
    outcome = Teleporter(objective, search).run(surface, {"backbone": module.backbone}, surface.point())
    assert outcome.accepted
    assert surface.copies == copies
    assert surface.most == 2


class Careless(LevelSetSearch):
    """Writes into the parameters behind the back of the surface, and of PyTorch, which counts writes."""

    def candidates(self, context: SearchContext) -> Iterator[None]:
        for parameter in context.surface.shared:
            parameter.data += 0.1
        yield


class Temporary(LevelSetSearch):
    """Yields within `displaced`, which ends when the search is stopped."""

    def candidates(self, context: SearchContext) -> Iterator[None]:
        for scale in (1e-3, 1e-4):
            with context.surface.displaced(context.surface.standard_normal(), scale):
                yield


def test_a_search_that_writes_into_the_data_of_parameters_is_rolled_back() -> None:
    module = Plain()
    surface = module.surface()
    start = surface.point()
    before = state(module)
    teleporter = Teleporter(RandomDirection(), Careless(), tolerance=1e-9)
    assert not teleporter.run(surface, {"backbone": module.backbone}, start).accepted
    assert_same_state(state(module), before)


def test_a_search_may_move_back_when_it_is_stopped() -> None:
    module = Plain()
    surface = module.surface()
    start = surface.point()
    before = state(module)
    outcome = Teleporter(RandomDirection(), Temporary()).run(surface, {"backbone": module.backbone}, start)
    assert outcome.accepted
    assert not torch.equal(module.backbone[0].weight, before[0])
    torch.testing.assert_close(surface.losses(), outcome.end.losses, rtol=0, atol=0)
    assert outcome.sigma != 0


def test_a_refused_teleport_leaves_the_gradients_of_other_parameters_alone() -> None:
    module = Plain()
    torch.stack(list(module.losses().values())).mean().backward()
    before = state(module)
    surface = Surface(module.losses, list(module.backbone.parameters()))
    assert not Teleporter(Refusing(1)).run(surface, {"backbone": module.backbone}).accepted
    assert_same_state(state(module), before)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("invariance", "per-task"),
        ("tolerance", -1),
        ("tolerance", "0.1"),
        ("objective", "conflict"),
        ("search", LevelSetSearch),
    ],
)
def test_bad_arguments_are_refused_by_name(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must be .*; got"):
        Teleporter(**{argument: value})


def test_a_search_without_rounds_goes_nowhere() -> None:
    class Idle(LevelSetSearch):
        rounds = 0

        def __init__(self) -> None:
            super().__init__()
            self.rounds = 0

    module = Plain()
    assert not Teleporter(search=Idle()).run(module.surface(), {"backbone": module.backbone}).accepted


def test_memory_is_reused_from_teleport_to_teleport() -> None:
    module, teleporter = Plain(), Teleporter()
    matrices: set[int] = set()
    for _ in range(4):
        surface = module.surface()
        start = surface.point(spare=teleporter.take_spare())
        outcome = teleporter.run(surface, {"backbone": module.backbone}, start)
        for point in {id(point): point for point in (outcome.start, outcome.end)}.values():
            matrices.add(point.gradients.matrix.data_ptr())
            teleporter.recycle(point.gradients.matrix)
        # What was recycled twice would be written twice.
        assert len({matrix.data_ptr() for matrix in teleporter._spares}) == len(teleporter._spares)
    assert len(matrices) <= 3
    teleporter.clear()
    assert teleporter.take_spare() is None


def test_an_outcome_without_a_teleport_has_nothing_to_undo() -> None:
    point = Point(torch.ones(1))
    Outcome(False, "", point, point).undo()


@pytest.mark.parametrize(
    ("move", "gradient", "sigma"),
    [
        ([3.0, 4.0], [4.0, 3.0], 0.96),
        ([1.0, 0.0], [2.0, 0.0], 1.0),
        ([1.0, 1.0], [-1.0, -1.0], -1.0),
        ([1.0, 0.0], [0.0, 5.0], 0.0),
        ([0.0, 0.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([3e-20, 4e-20], [4e-25, 3e-25], 0.96),
        ([3e15, 4e15], [4e20, 3e20], 0.96),
    ],
)
def test_trajectory_similarity_is_the_cosine(move: list[float], gradient: list[float], sigma: float) -> None:
    for dtype in (torch.float32, torch.float64):
        found = trajectory_similarity(torch.tensor(move, dtype=dtype), torch.tensor(gradient, dtype=dtype))
        assert math.isclose(found, sigma, rel_tol=1e-6, abs_tol=1e-12)


class Restoring(LevelSetSearch):
    """Puts the parameters back by itself when it is stopped, behind the back of the surface."""

    def candidates(self, context: SearchContext) -> Iterator[None]:
        surface = context.surface
        origin = surface.position()
        try:
            surface.move_by(surface.standard_normal(), 1e-3)
            yield
        finally:
            torch.nn.utils.vector_to_parameters(origin, surface.shared)


class Displacing(LevelSetSearch):
    """Moves behind the back of the surface, and then evaluates losses elsewhere."""

    def candidates(self, context: SearchContext) -> Iterator[None]:
        surface = context.surface
        torch.nn.utils.vector_to_parameters(surface.position() + 1e-3, surface.shared)
        with surface.displaced(torch.ones(surface.num_parameters, dtype=torch.float64)):
            surface.losses()
        yield


@pytest.mark.parametrize("search", [Restoring(), Displacing()], ids=["restoring", "displacing"])
def test_an_accepted_point_stays_whatever_the_search_does(search: Any) -> None:
    module = Plain()
    surface = module.surface()
    before = state(module)
    outcome = Teleporter(RandomDirection(), search, tolerance=None).run(surface, {"backbone": module.backbone})
    assert outcome.accepted
    assert not torch.equal(module.backbone[0].weight, before[0])
    torch.testing.assert_close(surface.losses(), outcome.end.losses, rtol=0, atol=0)


def test_a_teleport_needs_no_enabled_gradients_and_finds_its_modules() -> None:
    module = Plain()
    with torch.no_grad():
        assert Teleporter().run(module.surface(), {"backbone": module.backbone}).accepted
    with pytest.raises(ValueError, match="reaches no weight"):
        Teleporter().run(module.surface(), {})
