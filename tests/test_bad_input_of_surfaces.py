"""Bad input to surfaces, task gradients and teleports without a Trainer: each kind gets an error that names it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_cost import LevelSetSearch, Majority, PenaltySearch, Point, RandomDirection, Surface, TaskGradients
from lightning_cost import Teleporter as Teleport
from lightning_cost.invariance import LevelSet
from lightning_cost.triggers import any_conflict, dominated_conflict, weak_conflict

ONES, MATRIX = torch.ones(2), torch.eye(2)
GRADIENTS = TaskGradients(["left", "right"], MATRIX)


def surface(**changed: Any) -> Surface:
    weight = Parameter(torch.ones(2))
    settings = {"batches": lambda: {"left": weight.sum(), "right": weight.square().sum()}, "shared": [weight]}
    return Surface(**{**settings, **changed})


def displaced(vector: Any, scale: Any = 1.0) -> None:
    with surface().displaced(vector, scale):
        pass


def run(**changed: Any) -> None:
    layer = nn.Linear(2, 2, bias=False)

    def losses() -> dict[str, Tensor]:
        return {"left": layer.weight.square().sum(), "right": (layer.weight[0] - 3).square().sum()}

    settings = {"surface": Surface(losses, [layer.weight]), "modules": {"backbone": layer}}
    Teleport().run(**{**settings, **changed})


def start(num_losses: int, num_tasks: int, size: int) -> Point:
    names = [str(index) for index in range(num_tasks)]
    return Point(torch.ones(num_losses), TaskGradients(names, torch.ones(num_tasks, size)))


ROWS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    # ------------------------------------------------------------------------------------------- making a surface
    "batches: number": (lambda: surface(batches=3), TypeError, "`batches` must be a sequence of functions; got 3"),
    "batches: nothing": (lambda: surface(batches=None), TypeError, "`batches` must be a sequence of functions; got No"),
    "batches: text": (
        lambda: surface(batches="losses"),
        TypeError,
        "`batches` must be a sequence of functions; got 'l",
    ),
    "batches: none": (lambda: surface(batches=[]), ValueError, "`batches` must hold at least one function; got none"),
    "batches return a list": (
        lambda: surface(batches=lambda: [1.0]).losses(),
        TypeError,
        r"A function in `batches` must return a dictionary.*\[1.0\]",
    ),
    "batches return no task": (lambda: surface(batches=dict).losses(), ValueError, "`batches` must return the loss of"),
    "shared: a module": (lambda: surface(shared=nn.Linear(1, 1)), TypeError, "`shared` must be a sequence of objects"),
    "shared: a parameter alone": (
        lambda: surface(shared=Parameter(ONES)),
        TypeError,
        "`shared` must be a sequence of objects of torch.nn.Parameter; got a tensor",
    ),
    "shared: nothing": (lambda: surface(shared=None), TypeError, "`shared` must be a sequence of objects.*got None"),
    "shared: parameters with names": (
        lambda: surface(shared=nn.Linear(1, 1).named_parameters()),
        TypeError,
        "`shared` must hold objects of torch.nn.Parameter; got ",
    ),
    "shared: complex": (
        lambda: surface(shared=[Parameter(ONES * 1j)]),
        TypeError,
        "`shared` must be a tensor of floating-point numbers; got torch.complex64",
    ),
    "parameters: text": (lambda: surface(parameters=["w"]), TypeError, "`parameters` must hold .*Parameter; got 'w'"),
    "parameters without the shared ones": (
        lambda: surface(parameters=[Parameter(ONES)]),
        ValueError,
        "`parameters` must hold all parameters of `shared`",
    ),
    "scalarize: text": (lambda: surface(scalarize="mean"), TypeError, "`scalarize` must be a function.*got 'mean'"),
    "scalarize returns a number": (
        lambda: surface(scalarize=lambda losses: 1.0).point(),
        TypeError,
        "`scalarize` must return a scalar tensor.*got 1.0",
    ),
    "scalarize returns a vector": (
        lambda: surface(scalarize=lambda losses: torch.stack(list(losses.values()))).point(),
        TypeError,
        r"`scalarize` must return a scalar tensor.*got shape \(2,\)",
    ),
    "scalarize returns nothing": (
        lambda: surface(scalarize=lambda losses: None).point(),
        TypeError,
        "`scalarize` must return a scalar tensor.*got None",
    ),
    "generator: a seed": (
        lambda: surface(generator=3),
        TypeError,
        "`generator` must be a torch.Generator or None; got",
    ),
    "numerics: text": (
        lambda: surface(numerics="bf16"),
        TypeError,
        "`numerics` must be a Numerics or None; got 'bf16'",
    ),
    "names: text": (lambda: surface(names="left"), TypeError, "`names` must be a sequence of task names; got 'left'"),
    "names: numbers": (lambda: surface(names=[1, 2]), TypeError, "`names` must be .* strings; got 1"),
    "names: one twice": (
        lambda: surface(names=["a", "a"]),
        ValueError,
        r"`names` must name each task once.*\['a', 'a'",
    ),
    # ----------------------------------------------------------------------------------------- moving on a surface
    "position: complex": (lambda: surface().move_to(ONES * 1j), TypeError, "`position` must be .*torch.complex64"),
    "position: integers": (lambda: surface().move_to(ONES.long()), TypeError, "`position` must be .*torch.int64"),
    "position: a list": (lambda: surface().move_to([1.0, 1.0]), ValueError, r"`position` must have shape \(2,\)"),
    "vector: complex": (lambda: surface().move_by(ONES * 1j), TypeError, "`vector` must be .*torch.complex64"),
    "scale: text": (lambda: surface().move_by(ONES, "1"), TypeError, "`scale` must be a number; got '1'"),
    "scale: nothing": (lambda: displaced(ONES, None), TypeError, "`scale` must be a number; got None"),
    "scale: a vector": (
        lambda: displaced(ONES, ONES),
        TypeError,
        r"`scale` must be a number; got a tensor of shape \(2",
    ),
    "displaced by another shape": (lambda: displaced(MATRIX), ValueError, r"`vector` must have shape \(2,\).*\(2, 2\)"),
    "hold another shape": (lambda: surface().hold(torch.ones(3)), ValueError, r"`position` must have shape \(2,\)"),
    "out of another shape": (lambda: surface().position(torch.ones(3)), ValueError, r"`out` must have shape \(2,\)"),
    "flatten too few": (lambda: surface().flatten([]), ValueError, "`tensors` must hold one tensor for each of 1"),
    "flatten another shape": (
        lambda: surface().flatten([torch.ones(3)]),
        ValueError,
        r"`tensors\[0\]` must have shape \(2,\) or be None; got a tensor of shape \(3,\)",
    ),
    "grads: too few": (lambda: surface().set_grads([]), ValueError, "`grads` must hold one tensor for each of 1"),
    "grads of another shape": (
        lambda: surface().set_grads([torch.ones(3)]),
        ValueError,
        r"`grads\[0\]` must have shape \(2,\) or be None; got a tensor of shape \(3,\)",
    ),
    # ---------------------------------------------------------------------------------------- evaluating a surface
    "weights: a list": (lambda: surface().gradient([1.0, 1.0]), ValueError, r"`weights` must have shape \(2,\)"),
    "weights: booleans": (lambda: surface().gradient(ONES > 0), TypeError, "`weights` must be .*torch.bool"),
    "weights: complex": (lambda: surface().gradient(ONES * 1j), TypeError, "`weights` must be .*torch.complex64"),
    "weights return nothing": (
        lambda: surface().gradient(lambda losses: None),
        ValueError,
        r"`weights` must have shape \(2,\), one for each of the tasks \['left', 'right'\]; got None",
    ),
    "Hessian: other weights": (
        lambda: surface().hessian_vector_products([torch.ones(3)], [ONES]),
        ValueError,
        r"`weights` must have shape \(2,\), one for each of the tasks",
    ),
    "Hessian: other vectors": (
        lambda: surface().hessian_vector_products([ONES], [torch.ones(3)]),
        ValueError,
        r"`vectors` must have shape \(2,\)",
    ),
    "Hessian: too few vectors": (
        lambda: surface().hessian_vector_products([ONES], []),
        ValueError,
        "`vectors` must hold one for each of `weights`, 1; got 0",
    ),
    "admit: text": (
        lambda: surface().point_if("yes"),
        TypeError,
        "`admit` must be a function of the losses; got 'yes'",
    ),
    "admit returns a vector": (
        lambda: surface().point_if(lambda losses: losses > 0),
        TypeError,
        r"`admit` must return True or False; got a tensor of shape \(2,\)",
    ),
    "admit returns nothing": (
        lambda: surface().point_if(lambda losses: None),
        TypeError,
        "`admit` must return True or False; got None",
    ),
    "near: text": (lambda: surface().point(near="here"), TypeError, "`near` must be a Point .*got 'here'"),
    "spare: text": (
        lambda: surface().point(spare="memory"),
        TypeError,
        "`spare` must be a tensor or None; got 'memory'",
    ),
    # ---------------------------------------------------------------------------------------------- task gradients
    "TaskGradients: names of text": (
        lambda: TaskGradients("ab", MATRIX),
        TypeError,
        "`names` must be a sequence of ta",
    ),
    "TaskGradients: names of numbers": (lambda: TaskGradients([1, 2], MATRIX), TypeError, "`names` must be .*got 1"),
    "TaskGradients: no names": (lambda: TaskGradients(None, MATRIX), TypeError, "`names` must be .*got None"),
    "TaskGradients: names of lists": (lambda: TaskGradients([["a"], ["b"]], MATRIX), TypeError, r"`names` .*\['a'\]"),
    "TaskGradients: an array": (
        lambda: TaskGradients(["a"], np.ones((1, 2))),
        TypeError,
        "`matrix` must be a tensor of",
    ),
    "TaskGradients: too many names": (
        lambda: TaskGradients(["a", "b", "c"], MATRIX),
        ValueError,
        r"`matrix` must have shape .* 3 rows.*\(2, 2\)",
    ),
    "select by text": (lambda: GRADIENTS.select("left"), TypeError, "`names` must be a sequence of task names; got 'l"),
    "select nothing": (lambda: GRADIENTS.select(None), TypeError, "`names` must be a sequence of task names; got None"),
    "the mean of no task": (
        lambda: dominated_conflict(TaskGradients([], torch.ones(0, 2))),
        ValueError,
        "TaskGradients without tasks have no mean",
    ),
    "dominated_conflict of a matrix": (
        lambda: dominated_conflict(MATRIX),
        TypeError,
        "`gradients` must be a TaskGradi",
    ),
    "any_conflict of a matrix": (lambda: any_conflict(MATRIX), TypeError, "`gradients` must be a TaskGradients"),
    "weak_conflict of a matrix": (lambda: weak_conflict(MATRIX), TypeError, "`gradients` must be a TaskGradients"),
    "Majority of a matrix": (
        lambda: Majority()(MATRIX),
        TypeError,
        "`gradients` must be a TaskGradients.*task_gradients",
    ),
    "LevelSet of a matrix": (lambda: LevelSet(MATRIX, "mean"), TypeError, "`gradients` must be a TaskGradients; got"),
    "LevelSet: invariance": (lambda: LevelSet(GRADIENTS, "all"), ValueError, "`invariance` must be one of .*'all'"),
    "tangent of another shape": (
        lambda: LevelSet(GRADIENTS, "mean").tangent(torch.ones(3)),
        ValueError,
        r"`vector` must have shape \(2,\), one element for each column of the gradients; got .*\(3,\)",
    ),
    "retraction of other tasks": (
        lambda: LevelSet(GRADIENTS, "mean").retraction(torch.ones(3)),
        ValueError,
        r"`residuals` must have shape \(2,\), one for each task; got a tensor of shape \(3,\)",
    ),
    # ----------------------------------------------------------------------------------- a teleport without a Trainer
    "run on a tensor": (
        lambda: run(surface=ONES),
        TypeError,
        r"`surface` must be a Surface; got a tensor of shape \(2",
    ),
    "run: modules in a list": (
        lambda: run(modules=[nn.Linear(1, 1)]),
        TypeError,
        "`modules` must be the shared modules",
    ),
    "run: a module alone": (lambda: run(modules=nn.Linear(1, 1)), TypeError, "`modules` must be the shared modules by"),
    "run: modules of text": (lambda: run(modules={"a": "x"}), TypeError, r"`modules\['a'\]` must be a torch.nn.Module"),
    "run: start is a number": (lambda: run(start=3.0), TypeError, "`start` must be a Point with task gradients.*3.0"),
    "run: start of another size": (
        lambda: run(start=start(2, 2, 3)),
        ValueError,
        r"`start.gradients.matrix` must have shape \(2, 4\)",
    ),
    "run: start of other losses": (
        lambda: run(start=start(3, 2, 4)),
        ValueError,
        r"`start.losses` must have shape \(2,\), one for each of \['0', '1'\]",
    ),
    "run: learning_rate": (
        lambda: run(learning_rate=-1.0),
        ValueError,
        "`learning_rate` must be a number of at least 0",
    ),
    "run: learning_rate of text": (lambda: run(learning_rate="x"), ValueError, "`learning_rate` must be .*got 'x'"),
    "run: learning_rate of NaN": (lambda: run(learning_rate=math.nan), ValueError, "`learning_rate` must be .*got nan"),
    "run: on_stage": (
        lambda: run(on_stage="print"),
        TypeError,
        "`on_stage` must be a function of the stage; got 'prin",
    ),
    "recycle text": (lambda: Teleport().recycle("memory"), TypeError, "`matrix` must be a tensor of .*got 'memory'"),
    "Teleporter: search": (
        lambda: Teleport(search=LevelSetSearch),
        ValueError,
        "`search` must be a Search; got <class",
    ),
    "Teleporter: tolerance": (
        lambda: Teleport(tolerance=math.nan),
        ValueError,
        "`tolerance` must be a positive number",
    ),
    "gamma and invariance_weight of zero": (
        lambda: PenaltySearch(gamma=0, invariance_weight=0),
        ValueError,
        "`gamma=0` with `invariance_weight=0` leaves nothing to search for",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ROWS.values(), ids=ROWS)
def test_bad_input_is_named(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_a_random_direction_has_the_type_of_all_shared_parameters() -> None:
    single, double = Parameter(torch.ones(2)), Parameter(torch.ones(3, dtype=torch.float64))
    mixed = Surface(
        lambda: {"left": single.square().sum() + double.sum(), "right": (single.sum() - double.sum()).square()},
        [single, double],
    )
    outcome = Teleport(RandomDirection(), LevelSetSearch(full_rank=True)).run(mixed, {})
    assert outcome.accepted, outcome.reason
    assert mixed.standard_normal().dtype == torch.float64
