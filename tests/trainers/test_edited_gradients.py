"""Who edits ``.grad`` gets what the edit says, or hears that it would be lost."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchjd.aggregation import PCGrad, UPGrad

from tests.support.ddp_runs import scaler_plugins
from tests.support.nets import Net, assert_moved, fit, make_batches, values_of
from tests.support.task_rows import WatchedNet, assert_rows
from tests.support.teleporting import never, teleporter

MASKED = "backbone.0.weight"


def mask(module: Any) -> None:
    module.get_parameter(MASKED).grad[:3] = 0


def mask_through_data(module: Any) -> None:
    module.get_parameter(MASKED).grad.data[:3] = 0


def mask_by_another_tensor(module: Any) -> None:
    gradient = module.get_parameter(MASKED).grad.clone()
    gradient[:3] = 0
    module.get_parameter(MASKED).grad = gradient


EDITS = [mask, mask_through_data, mask_by_another_tensor]


class Edits(L.Callback):
    """Edits gradients in a hook, and optionally only at some batches."""

    def __init__(self, edit: Any, hook: str = "on_after_backward", at: Any = lambda batch_idx: True) -> None:
        def run(trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if at(trainer.fit_loop.batch_idx):
                edit(pl_module)

        setattr(self, hook, run)


class EditsItself(Net):
    """The same in a hook of the module."""

    def on_after_backward(self) -> None:
        mask(self)


def unmoved(module: Any) -> bool:
    return torch.equal(module.get_parameter(MASKED)[:3], Net().get_parameter(MASKED)[:3])


@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_a_mask_of_a_callback_holds_for_the_aggregation(edit: Any, hook: str, settings: Any) -> None:
    module = Net(UPGrad())
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.05)
    fit(module, make_batches(4), callbacks=[Edits(edit, hook)], **settings)
    assert unmoved(module)
    assert_moved(module)


def test_a_mask_of_the_module_holds_for_the_aggregation() -> None:
    module = EditsItself(UPGrad())
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.05)
    fit(module, make_batches(4))
    assert unmoved(module)
    assert_moved(module)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("method", [None, UPGrad()], ids=["LS", "UPGrad"])
def test_an_edit_between_micro_batches_leaves_the_rows_exact(edit: Any, method: Any) -> None:
    module = WatchedNet(method, request=lambda batch_idx: True)
    edits = Edits(edit, at=lambda batch_idx: batch_idx % 4 in (0, 1) and batch_idx > 3)
    fit(module, make_batches(16), callbacks=[edits], accumulate_grad_batches=4)
    assert_rows(module, steps=4)


def test_without_an_edit_a_row_still_comes_by_subtraction(differentiations: Any) -> None:
    fit(Net(UPGrad()), make_batches(8), accumulate_grad_batches=4)
    # The first window knows nothing of the norms.
    assert len(differentiations) == 4 * 3 + 4 * 2


@pytest.mark.parametrize("method", [None, UPGrad()], ids=["LS", "UPGrad"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_an_edit_that_a_teleport_would_lose_is_refused(edit: Any, method: Any, accumulated: int) -> None:
    module = Net(method)
    with pytest.raises(MisconfigurationException, match=rf"`.grad` of `{MASKED}` was edited after the backward pass"):
        fit(
            module,
            make_batches(4),
            callbacks=[Edits(edit), teleporter()],
            accumulate_grad_batches=accumulated,
        )
    assert torch.equal(values_of(module), values_of(Net()))


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_after_the_teleport_holds(edit: Any) -> None:
    callback = teleporter()
    module = Net(UPGrad())
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.05)
    fit(module, make_batches(4), callbacks=[callback, Edits(edit, "on_before_optimizer_step")])
    assert any(report.accepted for report in callback.reports)
    gradient = module.get_parameter(MASKED).grad
    assert gradient is None or not gradient[:3].any()


def test_between_checks_edits_are_free() -> None:
    callback = teleporter(check_every_n_steps=3)
    edits = Edits(mask, at=lambda batch_idx: batch_idx % 3 != 0)
    fit(Net(UPGrad()), make_batches(6), callbacks=[edits, callback])
    assert len(callback.reports) == 2


def test_a_gradient_scaler_is_no_edit() -> None:
    module, callback = Net(UPGrad()), teleporter(trigger=never)
    fit(module, make_batches(4), callbacks=[callback], plugins=scaler_plugins())
    assert_moved(module)


def test_a_hook_of_a_tensor_changes_the_rows_as_well() -> None:
    module = WatchedNet(UPGrad(), request=lambda batch_idx: True)
    weights = torch.ones(6, 5)
    weights[:3] = 0
    module.get_parameter(MASKED).register_hook(lambda gradient: gradient * weights)
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.05)
    fit(module, make_batches(5))
    assert_rows(module, steps=5)


def test_a_hook_that_edits_grad_within_backward_is_warned_of() -> None:
    module = WatchedNet(None, request=lambda batch_idx: True)

    def edit(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    module.get_parameter(MASKED).register_post_accumulate_grad_hook(edit)
    with pytest.warns(UserWarning, match=rf"`{MASKED}` has a hook of `register_post_accumulate_grad_hook`"):
        fit(module, make_batches(5))
    assert_rows(module, steps=5)


def test_a_callback_sees_the_aggregation_after_backward() -> None:
    seen = []

    class Look(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            found = torch.cat([parameter.grad.flatten() for parameter in pl_module.backbone.parameters()])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                seen.append((found, PCGrad()(pl_module.task_gradients.matrix)))

    class Seeded(Net):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                super().backward(loss, *args, **kwargs)

    fit(Seeded(PCGrad()), make_batches(3), callbacks=[Look()])
    for found, expected in seen:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert len(seen) == 3
