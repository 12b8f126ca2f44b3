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
    MeanNormalAngle,
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
    "drift of lists": (lambda: drift([1.0], [1.0], "mean"), TypeError, "`losses` must be a tensor of floating-point"),
    "drift of complex losses": (lambda: drift(ONES[0] * 1j, ONES[0], "mean"), TypeError, "`losses` .*complex64"),
    "drift of no task": (
        lambda: drift(ONES[0, :0], ONES[0, :0], "mean"),
        ValueError,
        r"`losses` must have shape \(K,\)",
    ),
    "drift of a matrix": (lambda: drift(ONES, ONES, "mean"), ValueError, r"`losses` must have shape \(K,\).*\(2, 3\)"),
    "fluctuation: relative": (
        lambda: loss_fluctuation(ONES[0], ONES[0], "mean", relative="no"),
        ValueError,
        "`relative` must be True or False; got 'no'",
    ),
    "balance_weights of a list": (lambda: balance_weights([1.0]), TypeError, "`norms` must be a tensor of floating"),
    "balance_weights of integers": (lambda: balance_weights(ONES[0].long()), TypeError, "`norms` .*torch.int64"),
    "balance_weights of nothing": (lambda: balance_weights(ONES[0, :0]), ValueError, r"`norms` must have shape \(K,\)"),
    "modulate: sigma": (lambda: modulate(ONES, ONES, math.nan), ValueError, "`sigma` must be from 0 to 1; got nan"),
    "modulate: integers": (lambda: modulate(ONES.long(), ONES, 0.5), TypeError, "`history` must be .*torch.int64"),
    "similarity of matrices": (
        lambda: trajectory_similarity(ONES, ONES),
        ValueError,
        r"`move` must have shape \(6,\), a vector; got a tensor of shape \(2, 3\)",
    ),
    "similarity of complex vectors": (
        lambda: trajectory_similarity(ONES[0] * 1j, ONES[0]),
        TypeError,
        "`move` must be a tensor of floating-point numbers; got torch.complex64",
    ),
    "ScaleInvariant of a list": (lambda: ScaleInvariant()([1.0]), TypeError, "`values` must be a tensor of floating"),
    "ScaleInvariant of integers": (lambda: ScaleInvariant()(ONES.long()), TypeError, "`values` .*torch.int64"),
    "ScaleInvariant of booleans": (lambda: ScaleInvariant()(ONES > 0), TypeError, "`values` .*torch.bool"),
    "ScaleInvariant of complex losses": (lambda: ScaleInvariant()(ONES * 1j), TypeError, "`values` .*complex64"),
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
    "depth: relative": (
        lambda: depth_error(ONES, ONES, relative=1),
        ValueError,
        "`relative` must be True or False; got 1",
    ),
    "depth: nothing": (lambda: AbsoluteDepthError().update(None, None), TypeError, "`target` must be a tensor of real"),
    "depth: sparse": (lambda: depth_error(ONES.to_sparse(), ONES), TypeError, "`preds` .*torch.sparse_coo"),
    "depth: mask of NumPy": (
        lambda: depth_error(ONES, ONES, np.ones((2, 3)) > 0),
        TypeError,
        "`mask` must hold booleans in a tensor, got ndarray",
    ),
    "normals without a direction": (
        lambda: normal_angles(PIXELS, 0 * PIXELS, torch.ones(2, 2) > 0),
        ValueError,
        "`target` must not be zero at a pixel of the `mask`.*4 are. Leave",
    ),
    "MeanNormalAngle without a direction": (
        lambda: MeanNormalAngle().update(PIXELS, 0 * PIXELS, torch.ones(2, 2) > 0),
        ValueError,
        "`target` must not be zero at a pixel of the `mask`.*4 are. Leave",
    ),
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
    "delta_m: no baselines": (lambda: delta_m(ONES[0], None, [True] * 3), TypeError, "`baselines` must be .*got None"),
    "delta_m: baselines of text": (
        lambda: delta_m(ONES[0, :2], ["a", "b"], [True] * 2),
        TypeError,
        r"`baselines` must be a tensor or a sequence of real numbers, got \['a', 'b'\]",
    ),
    "delta_m: baselines by name": (lambda: delta_m(ONES[0, :1], {"a": 1.0}, [True]), TypeError, "`baselines` must be"),
    "delta_m: one baseline is missing": (
        lambda: delta_m(ONES[0, :2], [1.0, None], [True] * 2),
        TypeError,
        "`baselines` must be .*None",
    ),
    "delta_m: baselines of booleans": (lambda: delta_m(ONES[0, :1], [True], [True]), TypeError, "`baselines` must be"),
    "delta_m: complex baselines": (
        lambda: delta_m(ONES[0, :2], torch.ones(2) * 1j, [True] * 2),
        TypeError,
        "`baselines` must be .*real numbers",
    ),
    "delta_m: directions of words": (
        lambda: delta_m(ONES[0, :2], [1.0, 1.0], ["up", "down"]),
        TypeError,
        r"`higher_is_better` must hold booleans, got \['up', 'down'\]",
    ),
    "delta_m: no directions": (
        lambda: delta_m(ONES[0, :1], [1.0], None),
        TypeError,
        "`higher_is_better` must hold booleans, got None",
    ),
    "mean_rank: directions by name": (
        lambda: mean_rank(ONES[:, :1], {"a": True}),
        TypeError,
        "`higher_is_better` must hold booleans",
    ),
    "DeltaM: a complex baseline": (
        lambda: DeltaM({"a": torch.tensor(1j)}, {"a": True}),
        TypeError,
        r"`baselines\['a'\]` must be a tensor of real numbers, got torch.complex64",
    ),
    "DeltaM: a complex value": (
        lambda: DeltaM({"a": 1.0}, {"a": True}).update({"a": torch.tensor(1 + 1j)}),
        TypeError,
        r"`values\['a'\]` must be a tensor of real numbers, got torch.complex64",
    ),
    "DeltaM: a value of a bool": (
        lambda: DeltaM({"a": 1.0}, {"a": True}).update({"a": torch.tensor(True)}),
        TypeError,
        r"`values\['a'\]` must be a tensor of real numbers, got torch.bool",
    ),
    "DeltaM: names of two kinds": (
        lambda: DeltaM({1: 1.0, "a": 1.0}, {1: True, "a": True}),
        TypeError,
        "`higher_is_better` must have names of metrics as keys.*got 1",
    ),
    "MeanRank: methods by number": (lambda: MeanRank([1, 2], {"x": True}), TypeError, "`methods` must be .*got 1"),
    "MeanRank: methods of lists": (lambda: MeanRank([["a"]], {"x": True}), TypeError, r"`methods` must be .*\['a'\]"),
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
        "`steps` must be a sequence of integers; got 1",
    ),
    "ConflictTrace: losses of text": (
        lambda: plots.ConflictTrace([1], ["a"], [True]),
        TypeError,
        "`losses` must be a sequence of numbers",
    ),
    "ConflictTrace: steps of text": (
        lambda: plots.ConflictTrace(["a"], [1.0], [True]),
        TypeError,
        "`steps` must be a sequence of integers",
    ),
    "ConflictTrace: conflicts of numbers": (
        lambda: plots.ConflictTrace([1], [1.0], [0.3]),
        TypeError,
        r"`conflicts` must be a sequence of bools; got \[0.3\]",
    ),
    "ConflictTrace: complex losses": (lambda: plots.ConflictTrace([1], [1j], [True]), TypeError, "`losses` must be"),
    "ConflictTrace: matrices": (
        lambda: plots.ConflictTrace(np.ones((2, 2), int), np.ones((2, 2)), np.ones((2, 2)) > 0),
        TypeError,
        "`steps` must be a sequence of integers",
    ),
    "ConflictTrace: ragged losses": (
        lambda: plots.ConflictTrace([1, 2], [[1.0], [1.0, 2.0]], [True, True]),
        TypeError,
        "`losses` must be a sequence of numbers",
    ),
    "ConflictTrace: reports of numbers": (
        lambda: plots.ConflictTrace([1], [1.0], [True], [1]),
        TypeError,
        r"`reports` must be a sequence of TeleportReport.*\[1\]",
    ),
    "losses that a logarithm has not": (
        lambda: plots.conflict_against_loss({"run": plots.ConflictTrace([1], [-1.0], [True])}),
        ValueError,
        r"`runs\['run'\].losses` must be positive, because their axis is logarithmic; the least is -1. Add",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ROWS.values(), ids=ROWS)
def test_bad_input_is_named(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        call()
