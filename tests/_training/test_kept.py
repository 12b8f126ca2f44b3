"""What a module keeps from hook to hook belongs to it alone, and is freed with it."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torchjd.aggregation import UPGrad

from lightning_cost import TaskGradients
from lightning_cost._training.kept import Kept
from tests.support.nets import Batch, Net, fit, make_batches
from tests.support.teleporting import teleporter


def test_a_module_is_freed_as_soon_as_nobody_needs_it() -> None:
    fitted = Net(UPGrad())
    fit(fitted, make_batches(2), callbacks=[teleporter()])
    gc.collect()
    gc.disable()
    try:
        module = Net(UPGrad())
        weight = weakref.ref(module.backbone[0].weight)
        del module
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("fitted", [False, True])
def test_a_shallow_copy_trains_itself(fitted: bool) -> None:
    class Doubled(Net):
        factor = 1.0

        def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
            self.calls = [*getattr(self, "calls", []), self.factor]
            return self.losses(batch)

    module = Doubled(UPGrad())
    if fitted:
        fit(module, make_batches(1))
    module.calls = []
    other = copy.copy(module)
    other.factor = 2.0
    fit(other, make_batches(3))
    assert other.calls == [2.0] * 3
    assert module.calls == []


def test_a_copy_does_not_continue_the_step() -> None:
    class Copying(L.Callback):
        kept: Kept | None = None

        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.kept = copy.deepcopy(pl_module)._multi_task
            assert pl_module.task_gradients is not None

    copying = Copying()
    fit(Net(UPGrad()), make_batches(2), callbacks=[copying])
    assert copying.kept is not None
    assert copying.kept.step is copying.kept.gradients is copying.kept.matrix is None
    assert copying.kept.names == ("left", "right", "ink")


def test_gradients_are_consistent_after_a_fit_that_ends_within_a_window() -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            assert pl_module.task_gradients.norms.isfinite().all()
            trainer.should_stop = trainer.fit_loop.batch_idx == 2

    module = Net(UPGrad())
    fit(module, make_batches(8), callbacks=[Stop()], accumulate_grad_batches=2)
    gradients = module.task_gradients
    assert gradients is not None
    torch.testing.assert_close(gradients.norms, TaskGradients(gradients.names, gradients.matrix).norms)


def test_an_exception_in_the_middle_of_differentiating_leaves_no_gradients() -> None:
    class Detached(Net):
        def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
            losses = self.losses(batch)
            return {**losses, "right": self.losses(batch, self.features(batch).detach())["right"]}

    class Look(L.Callback):
        seen: Any = "nothing"

        def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
            self.seen = pl_module.task_gradients

    look = Look()
    with pytest.raises(RuntimeError, match="'right' reaches no shared"):
        fit(Detached(UPGrad()), make_batches(2), callbacks=[look])
    assert look.seen is None
