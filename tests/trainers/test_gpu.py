"""What holds on the CPU holds on a GPU. Skipped without one."""

from __future__ import annotations

import gc
import warnings
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torchjd import scalarization
from torchjd.aggregation import UPGrad

from lightning_cost.searches import LevelSetSearch, PenaltySearch
from tests.support.impure import REPEATABLE, Impure
from tests.support.nets import Net, PlainNet, assert_moved, fit, make_batches, values_of
from tests.support.resumed_run import REMEMBERING
from tests.support.task_rows import WatchedNet, assert_rows
from tests.support.teleporting import NoisyNet, SaveAt, teleporter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

train = partial(fit, accelerator="gpu", devices=1)
ADAM = partial(torch.optim.Adam, lr=1e-2)
METHODS: dict[str, Any] = {
    **REMEMBERING,
    "LS": lambda: None,
    "UPGrad": UPGrad,
    "STCH": lambda: scalarization.STCH(1.0),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_every_method_trains_with_teleports(method: str, precision: Any) -> None:
    torch.manual_seed(0)
    module, callback = NoisyNet(METHODS[method]()), teleporter()
    module.make_optimizer = ADAM
    train(module, make_batches(8, size=32), callbacks=[callback], precision=precision)
    assert_moved(module)
    assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())
    assert len(callback.reports) >= 6
    if precision == "32-true":
        assert sum(report.accepted for report in callback.reports) >= 3
    assert all(report.drift <= 0.02 for report in callback.reports if report.accepted)


@pytest.mark.parametrize("search", [LevelSetSearch(full_rank=True), PenaltySearch(steps=2, lr=1e-2)], ids=str)
def test_every_search_teleports(search: Any) -> None:
    callback = teleporter(search=search)
    train(Net(UPGrad()), make_batches(6), callbacks=[callback])
    assert any(report.accepted for report in callback.reports)


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("method", [None, UPGrad()], ids=["LS", "UPGrad"])
def test_rows_are_the_gradients_of_each_loss(method: Any, accumulated: int) -> None:
    module = WatchedNet(method, request=lambda batch_idx: True)
    train(module, make_batches(6), accumulate_grad_batches=accumulated)
    assert_rows(module, steps=6 // accumulated, rtol=1e-4)


@pytest.mark.parametrize("way", REPEATABLE)
def test_losses_that_depend_on_more_than_the_batch_are_held(way: str) -> None:
    if way in ("generator", "global_generators", "counter", "python_generator", "numpy_generator", "dictionary"):
        pytest.skip("it draws on the CPU")
    callback = teleporter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(Impure([way]), make_batches(8), callbacks=[callback])
    assert sum(report.accepted for report in callback.reports) >= 3


def test_tasks_without_labels() -> None:
    class Partly(Net):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses: dict[str, Any] = {**super().task_losses(batch, batch_idx)}
            return losses | {"ink": None} if batch_idx % 2 else {} if batch_idx == 4 else losses

    module, callback = Partly(UPGrad()), teleporter()
    train(module, make_batches(8), callbacks=[callback])
    assert_moved(module)
    assert sum(report.accepted for report in callback.reports) >= 3


def test_a_window_that_is_not_finished_ends_the_fit_without_an_error() -> None:
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            trainer.should_stop = trainer.fit_loop.batch_idx == 4

    module = Net(UPGrad())
    train(module, make_batches(12), callbacks=[Stops(), teleporter()], accumulate_grad_batches=4)
    train(module, make_batches(4), callbacks=[teleporter()])
    fit(module, make_batches(4), callbacks=[teleporter()])


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Any) -> None:
    def run(ckpt_path: Any = None, **settings: Any) -> Any:
        torch.manual_seed(0)
        module, callback = Net(UPGrad()), teleporter()
        module.make_optimizer = ADAM
        callbacks = [callback, SaveAt(tmp_path / "saved.ckpt", 4)] if ckpt_path is None else [callback]
        batches = make_batches(4)
        train(module, batches, callbacks=callbacks, ckpt_path=ckpt_path, max_epochs=2, **settings)
        return values_of(module), [report.losses_after for report in callback.reports]

    whole, reports = run()
    resumed, others = run(tmp_path / "saved.ckpt")
    assert torch.equal(whole, resumed)
    assert others == reports


def test_no_memory_is_left_when_the_module_is_gone() -> None:
    def once() -> int:
        module = Net(UPGrad())
        train(module, make_batches(4), callbacks=[teleporter()])
        del module
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    once()
    first = once()
    assert once() <= first


def waits(module: Any, steps: int) -> int:
    """How often the program waits for the GPU in a fit, as CUDA itself counts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(module, make_batches(steps))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(("method", "most"), [(None, 0), (UPGrad, 2), (partial(scalarization.FAMO, 3), 2)])
def test_a_step_waits_for_the_gpu_at_most_twice(method: Any, most: int) -> None:
    more = [waits(Net(None if method is None else method()), steps) - waits(PlainNet(), steps) for steps in (10, 20)]
    # What goes to the GPU is counted as well: one transfer of weights.
    assert more[1] - more[0] <= 10 * (most + (most > 0))
