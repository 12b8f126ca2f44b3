"""What a multi-task method returns is looked at before the step, and its errors say whose they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchjd import aggregation, scalarization
from torchjd.aggregation import Aggregator, NashMTL, UPGrad
from torchjd.scalarization import FAMO, UW, GeometricMean, Scalarizer

from lightning_cost._training.method_checks import check_number_of_tasks
from lightning_cost._training.method_state import state_of
from tests.support.ddp_runs import scaler_plugins
from tests.support.nets import Net, assert_moved, assert_same_parameters, fit, make_batches
from tests.support.resumed_run import REMEMBERING
from tests.support.teleporting import assert_same, teleporter

THREE = ("left", "right", "ink")


class Returning(Aggregator):
    """Returns what a function makes of the mean row, from the second step on."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change
        self.calls = 0

    def forward(self, matrix: Tensor, /) -> Tensor:
        self.calls += 1
        result: Tensor = matrix.mean(dim=0)
        return self.change(result) if self.calls > 1 else result


class Weighing(Scalarizer):
    """The same for a scalarizer."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change
        self.calls = 0

    def forward(self, values: Tensor, /) -> Tensor:
        self.calls += 1
        return self.change(values) if self.calls > 1 else values.mean()


def fail(value: Tensor) -> Tensor:
    raise ArithmeticError("no solution")


BAD = {
    "NaN": (Returning, lambda row: row * torch.nan, ValueError, "what it returned is not"),
    "infinite": (Returning, lambda row: row / 0, ValueError, "what it returned is not"),
    "shape": (Returning, lambda row: row[:3], TypeError, r"must return a tensor of shape \(64,\); got shape \(3,\)"),
    "type": (Returning, lambda row: row.tolist(), TypeError, r"of shape \(64,\); got type list"),
    "error": (Returning, fail, ArithmeticError, "no solution"),
    "scalarized NaN": (Weighing, lambda values: (values - values).sqrt().sum(), ValueError, "not all finite"),
    "scalarized vector": (Weighing, lambda values: values, TypeError, r"a tensor of shape \(\); got shape \(3,\)"),
    "scalarized number": (Weighing, lambda values: 1.0, TypeError, r"a tensor of shape \(\); got type float"),
    "scalarized error": (Weighing, fail, ArithmeticError, "no solution"),
}


@pytest.mark.parametrize(("kind", "change", "error", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_what_a_method_returns_is_checked_before_the_step(
    kind: Any, change: Any, error: type[Exception], message: str, accumulated: int
) -> None:
    module, once = Net(kind(change)), Net(kind(change))
    steps = 1 if kind is Returning else 1 / accumulated
    fit(once, make_batches(int(steps * accumulated)), accumulate_grad_batches=accumulated)
    with pytest.raises(
        (ValueError, RuntimeError), match=rf"`mtl_method` {kind.__name__} failed at step [01]: .*{message}"
    ) as caught:
        fit(module, make_batches(4), accumulate_grad_batches=accumulated)
    assert isinstance(caught.value.__cause__, error)
    if kind is Returning or accumulated == 1:
        assert_same_parameters(module, once)


def test_a_loss_of_zero_under_the_geometric_mean_is_refused_in_its_own_step() -> None:
    class Saturated(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            losses = super().task_losses(batch, batch_idx)
            return losses | {"ink": losses["ink"].clamp(max=0.0)} if batch_idx == 2 else losses

    module, before = Saturated(GeometricMean()), Net(GeometricMean())
    with pytest.raises(ValueError, match=r"GeometricMean failed at step 2: for the losses \[.*, 0.0\] it returned"):
        fit(module, make_batches(4))
    fit(before, make_batches(2))
    assert_same_parameters(module, before)


def test_a_gradient_scaler_does_not_hide_a_method_that_fails() -> None:
    class Saturated(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            losses = super().task_losses(batch, batch_idx)
            return losses | {"ink": losses["ink"].clamp(max=0.0)}

    with pytest.raises(ValueError, match="GeometricMean failed at step 0"):
        fit(Saturated(GeometricMean()), make_batches(2), plugins=scaler_plugins())


def test_a_bad_aggregation_at_the_point_of_a_teleport_moves_nothing() -> None:
    class Twice(Returning):
        def forward(self, matrix: Tensor, /) -> Tensor:
            assert torch.is_tensor(matrix)
            return super().forward(matrix)

    torch.manual_seed(0)
    module, callback = Net(Twice(lambda row: row * torch.nan)), teleporter()
    module.mtl_method.calls = 0
    # The first call is for the gradients of the first step, the second for those where its teleport arrives.
    module.mtl_method.remembers = True
    with pytest.raises(ValueError, match="Twice failed at step"):
        fit(module, make_batches(3), callbacks=[callback])
    assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())


OUT_OF_MEMORY = torch.OutOfMemoryError("full")


def test_running_out_of_memory_stays_what_it_is() -> None:
    def full(row: Tensor) -> Tensor:
        raise OUT_OF_MEMORY

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(Net(Returning(full)), make_batches(3))
    assert caught.value is OUT_OF_MEMORY


COUNTED: dict[str, tuple[Any, str]] = {
    "Nash-MTL": (partial(NashMTL, 2), "`n_tasks`"),
    "Nash-MTL of more": (partial(NashMTL, 4), "`n_tasks`"),
    "UW": (partial(UW, 2), "`shape`"),
    "FAMO": (partial(FAMO, 4), "`shape` or `min_losses`"),
    "IMTL-L": (partial(scalarization.IMTLL, 2), "`shape`"),
    "Constant": (partial(scalarization.Constant, torch.ones(2)), "`weights`"),
    "Constant aggregator": (partial(aggregation.Constant, torch.ones(2)), "`weights`"),
    "preference": (partial(UPGrad, pref_vector=torch.ones(2)), "`pref_vector`"),
    "leak": (partial(aggregation.GradDrop, leak=torch.ones(2)), "`leak`"),
    "Krum": (partial(aggregation.Krum, 3), "`n_byzantine` or `n_selected`"),
    "trimmed mean": (partial(aggregation.TrimmedMean, 2), "`trim_number`"),
}


@pytest.mark.parametrize(("make", "option"), COUNTED.values(), ids=COUNTED)
def test_a_method_for_another_number_of_tasks_names_the_option(make: Any, option: str) -> None:
    module = Net(make())
    message = rf"does not work with the 3 tasks \['left', 'right', 'ink'\]: .*Set its option {option} to match"
    with pytest.raises(MisconfigurationException, match=f"(?s){message}"):
        fit(module, make_batches(1))
    assert all(
        torch.equal(value, Net().get_parameter(name))
        for name, value in module.named_parameters()
        if not name.startswith("mtl_method")
    )


@pytest.mark.parametrize("name", REMEMBERING)
def test_trying_a_method_leaves_no_trace(name: str) -> None:
    method = REMEMBERING[name]()
    before, random = state_of(method), torch.get_rng_state()
    check_number_of_tasks(method, THREE, torch.device("cpu"))
    assert_same(state_of(method), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_method_that_is_set_in_mid_training_is_made_ready() -> None:
    class Changes(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.mtl_method = FAMO(3)

    module = Changes(None)
    fit(module, make_batches(3), max_epochs=2)
    assert module.mtl_method._w.abs().max() > 0
    module = Changes(None)
    module.on_train_epoch_start = lambda: setattr(module, "mtl_method", UW(3))  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match=r"UW learns mtl_method.log_var, but no optimizer has it"):
        fit(module, make_batches(3))


def test_a_method_under_another_name_is_noticed() -> None:
    class Misspelt(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.mtl_method
            self.mtl_metod = UPGrad()

    with pytest.raises(MisconfigurationException, match="Misspelt has UPGrad as `mtl_metod`, but no `mtl_method`"):
        fit(Misspelt(), make_batches(1))


def test_a_method_under_another_name_of_the_class_is_noticed() -> None:
    class Misspelt(Net):
        method = GeometricMean()

        def __init__(self) -> None:
            super().__init__()
            del self.mtl_method

    with pytest.raises(MisconfigurationException, match="Misspelt has GeometricMean as `method`"):
        fit(Misspelt(), make_batches(1))


def test_several_methods_may_be_kept_beside_the_chosen_one() -> None:
    class Kept(Net):
        def __init__(self) -> None:
            super().__init__()
            self.others = torch.nn.ModuleList([UPGrad()])
            self.spare = UPGrad()

    module = Kept()
    fit(module, make_batches(2))
    assert_moved(module)


@pytest.mark.parametrize("method", [None, UPGrad(), UW(3)], ids=["LS", "UPGrad", "UW"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_detached_loss_is_noticed_under_every_method(method: Any, at: int) -> None:
    class Detached(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            losses = super().task_losses(batch, batch_idx)
            return losses | {"right": losses["right"].detach()} if batch_idx == at else losses

    with pytest.raises(ValueError, match=r"The loss of task 'right' has no graph.*return None"):
        fit(Detached(method), make_batches(4))
