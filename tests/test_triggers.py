"""When to teleport: Eq. 3, Eq. 4 and Definition 1 on gradients worked by hand, and the schedule of the checks."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_cost import SymmetryTeleportCallback, TaskGradients
from lightning_cost.triggers import TRIGGERS, Majority, Schedule, any_conflict, dominated_conflict, weak_conflict
from tests.support.problems import mlp_batch, mlp_problem, rows, trainer

# g_0 = (1, 2): the smaller gradient has cosine -1/sqrt(5) with it.
DOMINATED = rows([3, 4], [-1, 0])
# g_0 = (1/4, 1/2): the gradients conflict with each other, none with the mean.
ONLY_WEAK = rows([1, 0], [-0.5, 1])
# 3 g_0 = (7, 1): the second gradient conflicts with the mean, the smallest does not.
NOT_THE_SMALLEST = rows([10, 0], [-4, 1], [1, 0])
# Orthogonal to the mean, which is no conflict: 2 g_0 = (5, 0).
BOUNDARY = rows([5, -1], [0, 1])
NONE = rows([1, 0], [0, 1])


@pytest.mark.parametrize(
    ("gradients", "dominated", "any_", "weak"),
    [
        (DOMINATED, True, True, True),
        (ONLY_WEAK, False, False, True),
        (NOT_THE_SMALLEST, False, True, True),
        (BOUNDARY, False, False, True),
        (NONE, False, False, False),
    ],
)
def test_conflict_of_hand_computed_gradients(gradients: TaskGradients, dominated: bool, any_: bool, weak: bool) -> None:
    assert dominated_conflict(gradients) is dominated
    assert any_conflict(gradients) is any_
    assert weak_conflict(gradients) is weak


def test_names_stand_for_the_triggers() -> None:
    expected = {"dominated": dominated_conflict, "majority": Majority(0.5), "any": any_conflict, "weak": weak_conflict}
    assert expected == TRIGGERS


def test_a_task_without_gradient_conflicts_with_nothing() -> None:
    gradients = rows([3, 4], [0, 0])
    assert not any(trigger(gradients) for trigger in TRIGGERS.values())


def test_the_smallest_gradient_decides_whatever_its_place() -> None:
    for order in ([0, 1], [1, 0]):
        assert dominated_conflict(TaskGradients(["a", "b"], DOMINATED.matrix[order]))
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        assert not dominated_conflict(TaskGradients(["a", "b", "c"], NOT_THE_SMALLEST.matrix[order]))


def with_conflicts(num_tasks: int, conflicts: int) -> TaskGradients:
    """One large gradient, and small ones of which exactly so many point against it."""
    small = [-1.0] * conflicts + [1.0] * (num_tasks - 1 - conflicts)
    return rows([2.0 * num_tasks], *([value] for value in small))


@pytest.mark.parametrize(("num_tasks", "half"), [(2, 1), (3, 2), (4, 2), (5, 3), (7, 4), (40, 20)])
def test_majority_is_half_of_the_tasks_rounded_up(num_tasks: int, half: int) -> None:
    assert Majority()(with_conflicts(num_tasks, half))
    assert not Majority()(with_conflicts(num_tasks, half - 1))


@pytest.mark.parametrize("share", ["0.1", "0.25", "0.28", "0.3", "0.55", "0.6", "0.9"])
def test_shares_are_rounded_up_exactly(share: str) -> None:
    for num_tasks in range(2, 41):
        needed = math.ceil(Fraction(share) * num_tasks)
        if needed < num_tasks:
            assert Majority(float(share))(with_conflicts(num_tasks, needed)), num_tasks
        assert not Majority(float(share))(with_conflicts(num_tasks, needed - 1)), num_tasks


def test_however_small_the_share_one_task_must_conflict() -> None:
    assert not Majority(1e-12)(NONE)
    assert Majority(1e-12)(DOMINATED)


def test_not_all_tasks_can_conflict_with_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_tasks in (2, 3, 5):
        for _ in range(50):
            matrix = torch.randn(num_tasks, 3, generator=generator, dtype=torch.float64)
            assert not Majority(1.0)(TaskGradients([str(i) for i in range(num_tasks)], matrix))


@pytest.mark.parametrize("share", [0, -0.5, 1.5, math.nan])
def test_majority_refuses_what_is_no_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"`share` must be in \(0, 1\]; got"):
        Majority(share)


# ------------------------------------------------------------------------------------------------------------ schedule


def test_schedule_starts_late() -> None:
    schedule = Schedule(start_epoch=2)
    assert [schedule.due(epoch, step=10, tried=0) for epoch in range(5)] == [False, False, True, True, True]


def test_schedule_checks_every_nth_step() -> None:
    schedule = Schedule(start_epoch=0, check_every_n_steps=3)
    assert [step for step in range(10) if schedule.due(0, step, tried=0)] == [0, 3, 6, 9]


def test_schedule_stops_at_the_limit_of_an_epoch() -> None:
    schedule = Schedule(start_epoch=0, max_per_epoch=2)
    assert [schedule.due(0, 5, tried) for tried in range(4)] == [True, True, False, False]
    assert Schedule(start_epoch=0).due(0, 5, tried=10**6)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("start_epoch", [-1, 1.0, True, None, "1"]),
        ("check_every_n_steps", [0, -2, 1.5, True, None]),
        ("max_per_epoch", [0, -1, 2.0, True, "all"]),
    ],
)
def test_schedule_refuses_bad_arguments(name: str, values: list[Any]) -> None:
    least = 0 if name == "start_epoch" else 1
    for value in values:
        message = f"`{name}` must be an integer of at least {least}; got {value!r}"
        with pytest.raises(ValueError, match=message):
            Schedule(**{name: value})
        with pytest.raises(ValueError, match=message):
            SymmetryTeleportCallback(**{name: value})


@pytest.mark.parametrize(
    ("settings", "checked", "tried"),
    [
        ({"start_epoch": 1, "check_every_n_steps": 3}, [9, 12, 15, 18], [9, 12, 15, 18]),
        ({"start_epoch": 1, "check_every_n_steps": 3, "max_per_epoch": 1}, [9, 15], [9, 15]),
        ({"start_epoch": 2, "max_per_epoch": 2}, [14, 15], [14, 15]),
        ({"start_epoch": 3}, [], []),
    ],
)
def test_a_training_run_follows_the_schedule(settings: dict[str, Any], checked: list[int], tried: list[int]) -> None:
    asked: list[int] = []
    batches = [mlp_batch(seed=seed) for seed in range(7)]
    module = mlp_problem()
    run = trainer(max_epochs=3)

    def always(gradients: TaskGradients) -> bool:
        asked.append(run.global_step)
        return True

    teleport = SymmetryTeleportCallback(trigger=always, **settings)
    run.callbacks.append(teleport)
    run.fit(module, DataLoader(batches, batch_size=None))
    assert asked == checked
    assert [report.step for report in teleport.reports] == tried
    assert [report.epoch for report in teleport.reports] == [step // 7 for step in tried]
