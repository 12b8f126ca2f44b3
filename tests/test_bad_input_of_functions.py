"""Bad input to functions, metrics and plots: each kind gets an error that names the argument and says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn import Parameter

from lightning_cost import (
    ScaleInvariant,
    Surface,
    SymmetryTeleportCallback,
    TaskGradients,
    Teleporter,
    plots,
)
from lightning_cost._teleport.optimizer_state import modulate
from lightning_cost._teleport.run import trajectory_similarity
from lightning_cost.invariance import drift, loss_fluctuation
from lightning_cost.metrics import (
    AbsoluteDepthError,
    DeltaM,
    MeanRank,
    NormalsWithin,
    RelativeDepthError,
    delta_m,
    depth_error,
    mean_rank,
    normal_angles,
)
from lightning_cost.objectives import balance_weights
from tests.support.teleporting import teleporter

Callback = SymmetryTeleportCallback
CONFIG = MisconfigurationException
ONES, PIXELS = torch.ones(2, 3), torch.ones(2, 3, 2)


def surface(**changed: Any) -> Surface:
    weight = Parameter(torch.ones(2))
    settings = {"batches": lambda: {"left": weight.sum(), "right": weight.square().sum()}, "shared": [weight]}
    return Surface(**{**settings, **changed})


GRADIENTS = ["left", "right"], torch.eye(2)

ROWS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    # ------------------------------------------------------------------------------- surfaces, gradients, equations
    "Teleporter: objective by name": (lambda: Teleporter("conflict"), ValueError, "`objective` must be an Objective"),
    "batches: no function": (lambda: surface(batches=[1]), TypeError, "`batches` must hold functions; got 1"),
    "shared: no parameter": (lambda: surface(shared=[1.0]), TypeError, "`shared` must hold .*Parameter; got 1.0"),
    "shared: frozen": (
        lambda: surface(shared=[Parameter(torch.ones(1), requires_grad=False)]),
        ValueError,
        "`shared` must hold parameters that require a gradient",
    ),
    "position of another shape": (
        lambda: surface().move_to(torch.ones(3)),
        ValueError,
        r"`position` must have shape \(2,\), .*got a tensor of shape \(3,\)",
    ),
    "vector of another shape": (
        lambda: surface().move_by(torch.ones(1)),
        ValueError,
        r"`vector` must have shape \(2,\), .*got a tensor of shape \(1,\)",
    ),
    "weights of another shape": (
        lambda: surface().gradient(torch.ones(3)),
        ValueError,
        r"`weights` must have shape \(2,\), one for each of the tasks \['left', 'right'\]; got .*\(3,\)",
    ),
    "names twice": (lambda: TaskGradients(["a", "a"], torch.eye(2)), ValueError, r"`names` must .*\['a', 'a'\]"),
    "matrix: a list": (lambda: TaskGradients(["a"], [[1.0]]), TypeError, "`matrix` must be a tensor of floating-point"),
    "matrix: integers": (
        lambda: TaskGradients(["a"], torch.ones(1, 2, dtype=torch.int64)),
        TypeError,
        "`matrix` must be a tensor of floating-point numbers; got .*int64",
    ),
    "matrix: a vector": (lambda: TaskGradients(["a"], torch.ones(2)), ValueError, r"`matrix` must have shape.*\(2,\)"),
    "select an unknown task": (
        lambda: TaskGradients(*GRADIENTS).select(["ink"]),
        ValueError,
        r"`names` must be among the tasks \['left', 'right'\]; got 'ink'",
    ),
    "drift of other tasks": (
        lambda: drift(torch.ones(2), torch.ones(3), "per_task"),
        ValueError,
        r"`reference` must have the shape of `losses`, \(2,\); got a tensor of shape \(3,\)",
    ),
    "drift: invariance": (lambda: drift(ONES[0], ONES[0], "sum"), ValueError, "`invariance` must be one of .*'sum'"),
    "fluctuation of other tasks": (
        lambda: loss_fluctuation(torch.ones(2), torch.ones(3), "mean", relative=True),
        ValueError,
        "`reference` must have the shape of `losses`",
    ),
    "balance_weights of a matrix": (
        lambda: balance_weights(torch.eye(2)),
        ValueError,
        r"`norms` must have shape \(K,\); got a tensor of shape \(2, 2\)",
    ),
    "balance_weights of negative norms": (
        lambda: balance_weights(torch.tensor([1.0, -1.0])),
        ValueError,
        r"`norms` must be finite and not negative; got \[1.0, -1.0\]",
    ),
    "modulate by other shapes": (
        lambda: modulate(torch.ones(2), torch.ones(3), 0.5),
        ValueError,
        r"`fresh` must have the shape of `history`, \(2,\); got a tensor of shape \(3,\)",
    ),
    "similarity of other shapes": (
        lambda: trajectory_similarity(torch.ones(2), torch.ones(3)),
        ValueError,
        r"`gradient` must have the shape of `move`, \(2,\); got a tensor of shape \(3,\)",
    ),
    "ScaleInvariant of a loss of zero": (
        lambda: ScaleInvariant()(torch.tensor([1.0, 0.0])),
        ValueError,
        r"all must be positive; got \[1.0, 0.0\]",
    ),
    # ------------------------------------------------------------------------------------------------------- metrics
    "depth: NumPy": (
        lambda: depth_error(np.ones(2), torch.ones(2)),
        TypeError,
        r"`preds` must be a tensor of real numbers, got ndarray.*torch.as_tensor",
    ),
    "depth: complex": (lambda: depth_error(ONES * 1j, ONES), TypeError, "`preds` must be a tensor of real.*complex64"),
    "depth: booleans": (
        lambda: depth_error(ONES > 0, ONES),
        TypeError,
        "`preds` must be a tensor of real .*torch.bool",
    ),
    "depth: shapes": (lambda: depth_error(ONES, ONES[0]), ValueError, "`preds` .*shape"),
    "depth: mask of numbers": (lambda: depth_error(ONES, ONES, ONES), TypeError, "`mask` must hold booleans"),
    "relative depth over nothing": (
        lambda: depth_error(ONES, torch.tensor([[1.0, 0.0, -1.0]] * 2), ONES > 0, relative=True),
        ValueError,
        "`target` must be positive at all pixels of the `mask` for the relative error; 4 are not",
    ),
    "RelativeDepthError over nothing": (
        lambda: RelativeDepthError().update(ONES, 0 * ONES, ONES > 0),
        ValueError,
        "`target` must be positive at all pixels of the `mask` for the relative error; 6 are not",
    ),
    "nothing to compute": (lambda: AbsoluteDepthError().compute(), RuntimeError, "nothing to compute.*Call `update`"),
    "average: unknown": (lambda: AbsoluteDepthError(average="image"), ValueError, "`average` must be one of .*'image'"),
    "normals: NumPy": (lambda: normal_angles(PIXELS.numpy(), PIXELS), TypeError, "`preds` must be a tensor of real"),
    "normals: two components": (
        lambda: normal_angles(ONES[:, :2], ONES[:, :2]),
        ValueError,
        r"`target` must have shape",
    ),
    "degrees: bool": (lambda: NormalsWithin(True), ValueError, "`degrees` must be a multiple of .*got True"),
    "degrees: too many": (lambda: NormalsWithin(200), ValueError, "`degrees` must be a multiple of .*200"),
    "delta_m: a list": (
        lambda: delta_m([1.0, 2.0], [1.0, 2.0], [True, False]),
        TypeError,
        "`values` must be a tensor of real numbers.*list",
    ),
    "delta_m: a baseline of zero": (
        lambda: delta_m(torch.ones(2), [0.0, 1.0], [True, False]),
        ValueError,
        "`baselines` must be positive",
    ),
    "delta_m: NaN": (lambda: delta_m(torch.tensor([math.nan]), [1.0], [True]), ValueError, "`values` must be finite"),
    "delta_m: directions of numbers": (
        lambda: delta_m(torch.ones(2), [1.0, 1.0], [1, 0]),
        TypeError,
        "`higher_is_better` must hold booleans",
    ),
    "delta_m: complex": (
        lambda: delta_m(ONES[0] * 1j, [1.0] * 3, [True] * 3),
        TypeError,
        "`values` must be a tensor of",
    ),
    "mean_rank: NumPy": (
        lambda: mean_rank(np.ones((2, 2)), [True, True]),
        TypeError,
        "`values` must be a tensor of real",
    ),
    "DeltaM: a missing baseline": (lambda: DeltaM({"a": 1.0}, {"a": True, "b": True}), ValueError, r"missing \['b'\]"),
    "DeltaM: a baseline that is a bool": (
        lambda: DeltaM({"a": True}, {"a": True}),
        TypeError,
        r"`baselines\['a'\]` must be a number or a tensor with one element, got True",
    ),
    "MeanRank: a method twice": (lambda: MeanRank(["a", "a"], {"x": True}), ValueError, "must not name a method twice"),
    "MeanRank: unknown method": (
        lambda: MeanRank(["a"], {"x": True}).update("b", {"x": 1.0}),
        ValueError,
        r"`method` must be one of \['a'\], got 'b'",
    ),
    # --------------------------------------------------------------------------------------------------------- plots
    "a plot of an array": (
        lambda: plots.before_after({"run": np.ones(3)}),
        TypeError,
        r"`reports\['run'\]` must be a sequence of TeleportReport, such as `callback.reports`; got.*ndarray",
    ),
    "a plot of nothing": (lambda: plots.before_after({}), ValueError, "`reports` must map at least one title"),
    "a trace of an array": (
        lambda: plots.teleport_trace({"run": np.ones(3)}),
        TypeError,
        r"`reports\['run'\]` must be a TeleportReport.*ndarray",
    ),
    "a trace of a callback": (
        lambda: plots.teleport_trace({"run": teleporter()}),
        TypeError,
        r"`reports\['run'\]` must be a TeleportReport",
    ),
    "conflicts of an array": (
        lambda: plots.conflict_against_loss({"run": np.ones(3)}),
        TypeError,
        r"`runs\['run'\]` must be a ConflictTrace.*ndarray",
    ),
    "columns: zero": (
        lambda: plots.conflict_against_loss({"run": plots.ConflictTrace([1], [1.0], [True])}, columns=0),
        ValueError,
        "`columns` must be an integer of at least 1; got 0",
    ),
    "ConflictTrace of other lengths": (
        lambda: plots.ConflictTrace([1, 2], [1.0], [True]),
        ValueError,
        "same number of entries in each, at least one",
    ),
    "ConflictTrace of numbers": (
        lambda: plots.ConflictTrace(1, 1.0, True),
        TypeError,
        "`steps` must be a sequence; got 1",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ROWS.values(), ids=ROWS)
def test_bad_input_is_named(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        call()
