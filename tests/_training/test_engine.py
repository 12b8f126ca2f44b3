"""Who gets task gradients in which step, which batches are recorded, and which modules are refused."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from torchjd import scalarization
from torchjd.aggregation import UPGrad

from lightning_cost._training.engine import Engine
from tests.support.nets import TASKS, Net, PlainNet, assert_same_parameters, fit, make_batches
from tests.support.teleporting import never, teleporter


@pytest.mark.parametrize("method", [None, scalarization.UW(3)])
def test_no_task_is_differentiated_unless_somebody_asks(method: Any, differentiations: Any) -> None:
    module = Net(method)
    fit(module, make_batches(3))
    assert differentiations == []
    assert module.task_gradients is None


class Availability(L.Callback):
    """The hooks, in order, in which the task gradients can be read; asks for them at the given batches."""

    def __init__(self, request_at: Any = ()) -> None:
        self.request_at, self.available = request_at, []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.request_at:
            pl_module.request_task_gradients()

    def _note(self, hook: str, pl_module: Any) -> None:
        if pl_module.task_gradients is not None:
            assert pl_module.task_gradients.matrix.isfinite().all()
            self.available.append((hook, pl_module.global_step))

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._note("backward", pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._note("step", pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self._note("end", pl_module)


def test_a_request_holds_for_one_optimizer_step() -> None:
    callback, module = Availability(request_at=[1, 3]), Net()
    fit(module, make_batches(5), callbacks=[callback])
    assert callback.available == [
        *[("backward", 1), ("step", 1), ("end", 2)],
        *[("backward", 3), ("step", 3), ("end", 4)],
    ]
    assert module.task_gradients is None


def test_a_request_holds_for_all_micro_batches_of_an_optimizer_step() -> None:
    callback = Availability(request_at=[2])
    fit(Net(), make_batches(6), callbacks=[callback], accumulate_grad_batches=2)
    assert callback.available == [("backward", 1), ("end", 1), ("backward", 1), ("step", 1), ("end", 2)]


def test_an_aggregator_has_task_gradients_at_every_step() -> None:
    callback, module = Availability(), Net(UPGrad())
    assert module.task_gradients is None
    fit(module, make_batches(3), callbacks=[callback])
    hooks = [("backward", 0), ("step", 0), ("end", 1)]
    assert callback.available == [(hook, step + i) for i in range(3) for hook, step in hooks]


def test_reading_the_task_gradients_changes_nothing() -> None:
    read, unread = Net(UPGrad()), Net(UPGrad())
    fit(read, make_batches(8), callbacks=[Availability()], accumulate_grad_batches=2)
    fit(unread, make_batches(8), accumulate_grad_batches=2)
    assert_same_parameters(read, unread)


def test_batches_are_recorded_until_the_optimizer_step_and_those_of_validation_never() -> None:
    class Validated(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx < 4:
                Engine(self).request(batches=True)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self.training_step(batch, batch_idx)

        def val_dataloader(self) -> Any:
            return DataLoader(make_batches(2, seed=1), batch_size=None)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            recorded.append([record.scene.batch_idx for record in Engine(self).step.batches])
            values.extend(record.losses for record in Engine(self).step.batches)
            super().on_before_optimizer_step(optimizer)

    recorded, values, batches = [], [], make_batches(8)
    module = Validated()
    with torch.no_grad():
        first = torch.stack(list(module.losses(batches[0]).values()))
    fit(module, batches, accumulate_grad_batches=4, val_check_interval=2)
    assert recorded == [[0, 1, 2, 3], []]
    assert torch.equal(torch.stack(list(values[0].values())), first)


def test_replaying_tells_further_evaluations_from_training_steps() -> None:
    calls: list[bool] = []

    class Counting(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
            calls.append(self.replaying)
            return super().task_losses(batch, batch_idx)

    fit(Counting(), make_batches(4), callbacks=[teleporter()])
    assert calls.count(False) == 4
    assert calls.count(True) > 4


def test_an_interrupted_step_does_not_reach_into_the_next_fit() -> None:
    windows: list[int] = []

    def trigger(gradients: Any) -> bool:
        windows.append(len(Engine(module).step.batches))
        if len(windows) == 2:
            raise RuntimeError("interrupted")
        return True

    module = Net()
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(module, make_batches(4), callbacks=[teleporter(trigger=trigger)])
    fit(module, make_batches(3), callbacks=[teleporter(trigger=trigger)])
    assert windows == [1] * 5


@pytest.mark.parametrize("method", [None, UPGrad()])
def test_a_batch_can_be_a_tuple(method: Any) -> None:
    class TupleNet(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            assert isinstance(batch, (tuple, list))
            return self.losses(dict(zip(("x", *TASKS), batch, strict=True)))

    batches = make_batches(4)
    module, reference = TupleNet(method), Net(method)
    fit(module, [tuple(batch.values()) for batch in batches])
    fit(reference, batches)
    assert_same_parameters(module, reference)


def test_keys_may_come_in_another_order() -> None:
    class Shuffled(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            losses = list(self.losses(batch).items())
            return dict(losses[batch_idx % 3 :] + losses[: batch_idx % 3])

    module, reference = Shuffled(UPGrad(), scales=(1.0, 10.0, 0.1)), Net(UPGrad(), scales=(1.0, 10.0, 0.1))
    fit(module, make_batches(6))
    fit(reference, make_batches(6))
    assert module.task_gradients.names == TASKS
    assert_same_parameters(module, reference)


def test_freezing_between_backward_and_step_leaves_the_other_gradients_in_their_places() -> None:
    class Freeze(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.backbone[0].requires_grad_(False)

        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            pl_module.backbone[0].requires_grad_(True)

    frozen, free = Net(UPGrad()), Net(UPGrad())
    fit(frozen, make_batches(1), callbacks=[Freeze()])
    fit(free, make_batches(1))
    assert_same_parameters(frozen, free)


class EverySecondStep(Net):
    """Skips the last micro-batch of each window of two."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else loss


def test_a_window_whose_last_batch_is_skipped_is_aggregated() -> None:
    batches = make_batches(8)
    skipping, halved = EverySecondStep(UPGrad()), Net(UPGrad())
    halved.scales = dict.fromkeys(TASKS, 0.5)
    fit(skipping, batches, accumulate_grad_batches=2)
    fit(halved, batches[::2])
    assert_same_parameters(skipping, halved, atol=1e-6)


class EndsEpochsEarly(Net):
    """After five batches, in the middle of a window of four."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        Engine(self).request(batches=True)
        return -1 if batch_idx == 5 else None


class Windows(L.Callback):
    def __init__(self) -> None:
        self.seen = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([record.scene.batch_idx for record in Engine(pl_module).step.batches])


def test_an_abandoned_window_does_not_leak_into_the_next() -> None:
    windows = Windows()
    fit(EndsEpochsEarly(UPGrad()), make_batches(8), callbacks=[windows], accumulate_grad_batches=4, max_epochs=2)
    assert windows.seen == [[0, 1, 2, 3], [0, 1, 2, 3]]


class WithoutSuper(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(self.losses(batch).values())


class WithPenalty(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 0.1 * self.backbone[0].weight.square().sum()


class WithDictionary(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "extra": batch_idx}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WithoutSuper, r"WithoutSuper.training_step did not call `super\(\).training_step\(batch, batch_idx\)`"),
        (WithPenalty, "WithPenalty.training_step returned a loss other than the one of MultiTaskMixin.*no task"),
    ],
)
@pytest.mark.parametrize("accumulate_grad_batches", [1, 3])
def test_a_training_step_with_another_loss_is_refused_where_task_gradients_are_needed(
    kind: Any, message: str, accumulate_grad_batches: int
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(kind(UPGrad()), make_batches(3), accumulate_grad_batches=accumulate_grad_batches)
    with pytest.raises(MisconfigurationException, match=message):
        fit(kind(), make_batches(3), callbacks=[Availability(request_at=[0])])


def test_a_training_step_with_another_loss_is_plain_lightning_otherwise() -> None:
    class PlainWithPenalty(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + 0.1 * self.backbone[0].weight.square().sum()

    module, plain = WithPenalty(), PlainWithPenalty()
    fit(module, make_batches(3))
    fit(plain, make_batches(3))
    assert_same_parameters(module, plain)


def test_a_training_step_may_return_a_dictionary() -> None:
    module, reference = WithDictionary(UPGrad()), Net(UPGrad())
    fit(module, make_batches(3), accumulate_grad_batches=3)
    fit(reference, make_batches(3), accumulate_grad_batches=3)
    assert_same_parameters(module, reference)


def test_gradients_that_were_never_aggregated_are_noticed() -> None:
    class Silent(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

    with pytest.raises(
        MisconfigurationException, match=r"did not call `super\(\).on_before_optimizer_step\(optimizer\)`"
    ):
        fit(Silent(UPGrad()), make_batches(2))
    with pytest.raises(
        MisconfigurationException, match=r"did not call `super\(\).on_before_optimizer_step\(optimizer\)`"
    ):
        fit(Silent(UPGrad()), make_batches(2), callbacks=[teleporter(trigger=never)])


def test_reduce_dtype_is_checked() -> None:
    module = Net(UPGrad())
    module.reduce_dtype = "bf16"
    with pytest.raises(MisconfigurationException, match="`reduce_dtype` of Net must be a floating"):
        fit(module, make_batches(1))
