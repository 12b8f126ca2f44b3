"""The rows of a training step against ``torch.autograd.grad`` of each loss."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torchjd.aggregation import UPGrad

from lightning_cost import TaskGradients
from lightning_cost._training.accumulator import ExpectedNorms
from tests.support.nets import TASKS, Net, fit, make_batches
from tests.support.task_rows import METHODS, SwingingNet, WatchedNet, assert_rows, make_conv_net, swinging_batches


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_rows_are_the_gradients_of_each_loss(method: Any, num_tasks: int) -> None:
    tasks = [f"task{i}" for i in range(num_tasks)]
    module = WatchedNet(METHODS[method](num_tasks), tasks, request=lambda batch_idx: True)
    fit(module, make_batches(6, tasks))
    assert_rows(module, steps=6)
    assert module.task_gradients.names == tuple(tasks)


@pytest.mark.parametrize(
    ("method", "calls"), [("aggregator", [3, 2, 2, 2]), ("mean", [3, 2, 2, 2]), ("learned", [3, 3, 3, 3])]
)
def test_one_row_comes_by_subtraction_if_the_loss_weighs_the_tasks_equally(
    method: Any, calls: list[int], differentiations: Any
) -> None:
    module, seen = Net(METHODS[method](3)), []
    module.on_train_batch_start = lambda batch, batch_idx: module.request_task_gradients()

    class Count(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            seen.append(len(differentiations))
            differentiations.clear()

    fit(module, make_batches(4), callbacks=[Count()])
    assert seen == calls


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_accumulated_batches_with_an_incomplete_last_window(method: Any) -> None:
    module = WatchedNet(METHODS[method](3), request=lambda batch_idx: True)
    fit(module, make_batches(10), accumulate_grad_batches=4, max_epochs=2)
    assert_rows(module, steps=6)


@pytest.mark.parametrize("method", ["mean", "learned"])
def test_rows_asked_for_between_micro_batches_hold_those_from_there_on(method: Any) -> None:
    module = WatchedNet(METHODS[method](3), request=lambda batch_idx: batch_idx % 4 == 2)
    fit(module, make_batches(12), accumulate_grad_batches=4)
    assert_rows(module, steps=3)


@pytest.mark.parametrize("scales", [(1e5, 1.0, 1e-5), (1.0, 1e5, 1.0), (1e-5, 1e-5, 1.0)])
@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_rows_of_badly_scaled_tasks(scales: tuple[float, ...], accumulate_grad_batches: int) -> None:
    module = WatchedNet(UPGrad(), scales=scales)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-7)
    fit(module, make_batches(6), accumulate_grad_batches=accumulate_grad_batches)
    assert_rows(module, steps=6 // accumulate_grad_batches)


@pytest.mark.parametrize("tasks", [("left", "right"), TASKS, ("left", "a", "b", "c", "d")])
@pytest.mark.parametrize("scale", [10.0, 0.1])
@pytest.mark.parametrize("method", ["aggregator", "mean"])
def test_a_task_whose_gradient_vanishes_in_a_batch_has_a_row_of_zeros(
    tasks: tuple[str, ...], scale: float, method: Any
) -> None:
    module = SwingingNet(
        METHODS[method](len(tasks)), tasks, [scale] + [1.0] * (len(tasks) - 1), request=lambda batch_idx: True
    )
    module.swing = 0.0
    fit(module, swinging_batches(6, tasks=tasks))
    assert_rows(module, steps=6)
    assert [bool(rows[0].any()) for rows in module.actual] == [True, False] * 3


def test_a_vanishing_gradient_leaves_no_rounding_in_a_deep_network() -> None:
    module = SwingingNet(UPGrad(), scales=[10.0, 1.0, 1.0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module.backbone = make_conv_net(32)
    module.swing = 0.0
    fit(module, swinging_batches(6, size=32))
    assert [bool(rows[0].any()) for rows in module.actual] == [True, False] * 3


def test_a_vanishing_gradient_leaves_no_rounding_in_half_precision() -> None:
    module = SwingingNet(UPGrad(), scales=[10.0, 1.0, 1.0])
    module.swing = 0.0
    fit(module, swinging_batches(6), precision="bf16-mixed")
    assert [bool(rows[0].any()) for rows in module.actual] == [True, False] * 3


@pytest.mark.parametrize("swing", [1e-3, 1e-5])
def test_rows_of_a_task_whose_scale_changes_from_batch_to_batch(swing: float) -> None:
    module = SwingingNet(UPGrad(), scales=[1 / swing, 1.0, 1.0])
    module.swing = swing
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-7)
    fit(module, swinging_batches(6))
    assert_rows(module, steps=6)


def test_rows_where_the_optimizer_does_not_know_a_shared_parameter() -> None:
    module = WatchedNet(UPGrad())
    known = [module.backbone[0].weight, *module.heads.parameters()]
    module.configure_optimizers = lambda: torch.optim.SGD(known, lr=0.05)
    fit(module, make_batches(5))
    assert_rows(module, steps=5)


def test_rows_where_gradients_are_cleared_by_zeros() -> None:
    module = WatchedNet(UPGrad())
    module.optimizer_zero_grad = lambda epoch, batch_idx, optimizer: optimizer.zero_grad(set_to_none=False)
    fit(module, make_batches(8), accumulate_grad_batches=2)
    assert_rows(module, steps=4)


class StopOnce(L.Callback):
    """Ends the first run in the middle of an accumulation window, or with an error between backward and step."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.error:
            raise RuntimeError("interrupted")
        trainer.should_stop = True


@pytest.mark.parametrize("error", [True, False])
def test_rows_after_an_interrupted_run_hold_nothing_of_it(error: type[Exception]) -> None:
    module = WatchedNet(UPGrad())
    interrupted = {"accumulate_grad_batches": 4, "callbacks": [StopOnce(error)]}
    if error:
        with pytest.raises(RuntimeError, match="interrupted"):
            fit(module, make_batches(8), **interrupted)
    else:
        fit(module, make_batches(8), **interrupted)
    assert module.actual == []
    module.sum = 0
    fit(module, make_batches(4, seed=1))
    assert_rows(module, steps=4)


def test_rows_live_in_one_buffer() -> None:
    module, addresses = Net(UPGrad()), set()

    class Address(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            addresses.add(pl_module.task_gradients.matrix.data_ptr())

    fit(module, make_batches(4), callbacks=[Address()])
    assert len(addresses) == 1


def test_one_forward_a_step() -> None:
    module, forwards = Net(UPGrad()), []
    module.backbone.register_forward_hook(lambda *args: forwards.append(1))
    fit(module, make_batches(5))
    assert len(forwards) == 5


def test_the_largest_gradient_is_expected_from_the_losses() -> None:
    expected = ExpectedNorms()
    assert expected.largest(["left", "right"], [1.0, 1.0]) is None
    gradients = TaskGradients(["left", "right", "ink"], torch.tensor([[3.0, 4.0], [0.0, 1.0], [9.0, 0.0]]))
    expected.learn(gradients, {"left": -2.0, "right": 0.1, "ink": 0.0})
    # Norm over absolute loss. A loss of zero says nothing of its task.
    assert expected.rates == pytest.approx({"left": 2.5, "right": 10.0})
    assert expected.largest(["left", "right", "ink"], [1.0, 1.0, 1.0]) is None
    assert expected.largest(["left", "right"], [1.0, 1.0]) == 1
    assert expected.largest(["right", "left"], [1.0, 1.0]) == 0
    assert expected.largest(["left", "right"], [-5.0, 1.0]) == 0


@pytest.mark.parametrize("losses", [[0.0, 0.0], [1.0, torch.inf], [torch.inf, 1.0]])
def test_no_gradient_is_expected_to_be_the_largest_of_losses_that_tell_nothing(losses: list[float]) -> None:
    expected = ExpectedNorms()
    expected.rates = {"left": 2.0, "right": 3.0}
    assert expected.largest(["left", "right"], losses) is None


def test_rates_are_those_of_the_last_step_with_a_loss() -> None:
    expected = ExpectedNorms()
    for norm, loss in ((1.0, 1.0), (6.0, 2.0), (9.0, 0.0)):
        expected.learn(TaskGradients(["left"], torch.tensor([[norm]])), {"left": loss})
    assert expected.rates == {"left": 3.0}
    assert expected.means == {"left": pytest.approx(1 + 0.1 * (3 - 1))}
