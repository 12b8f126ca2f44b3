"""Only what the optimizer trains now takes part: in task gradients, in the aggregation, and in teleports."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder
from torch import Tensor
from torchjd.aggregation import UPGrad

from lightning_cost.searches import LevelSetSearch, PenaltySearch
from tests.support.nets import Net, fit, make_batches, values_of
from tests.support.teleporting import teleporter

pytestmark = pytest.mark.slow

SEARCHES = {
    "level set": LevelSetSearch(),
    "full rank": LevelSetSearch(full_rank=True),
    "penalty": PenaltySearch(steps=2, lr=1e-2),
}
METHODS: dict[str, Any] = {"LS": None, "UPGrad": UPGrad}


class Grouped(Net):
    """Trains what ``groups`` says, with a learning rate each; the rest is in no group."""

    def __init__(self, groups: dict[str, float], mtl_method: Any = None, optimizer: Any = torch.optim.Adam) -> None:
        super().__init__(mtl_method)
        self.groups, self.optimizer = groups, optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(
            [{"params": self.get_submodule(name).parameters(), "lr": lr} for name, lr in self.groups.items()]
        )


def changes(module: Net, start: Net) -> dict[str, float]:
    before = dict(start.named_parameters())
    return {name: float((value - before[name]).abs().max()) for name, value in module.named_parameters()}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("second", [{}, {"backbone.2": 0.0}], ids=["no group", "learning rate 0"])
def test_a_teleport_moves_what_the_optimizer_trains_and_nothing_else(search: Any, method: str, second: Any) -> None:
    callback = teleporter(search=search)
    module = Grouped({"backbone.0": 1e-2, "heads": 1e-2, **second}, METHODS[method] and METHODS[method]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, make_batches(8), callbacks=[callback])
    assert sum(report.accepted for report in callback.reports) >= 2
    assert module.task_gradients.matrix.shape == (3, 5 * 6 + 6)
    for name, change in changes(module, Net()).items():
        assert (change == 0) == name.startswith("backbone.2"), name


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_part_is_left_out_of_the_aggregation(method: str) -> None:
    """The run is that of a module whose untrained part requires no gradient."""
    found = []
    for frozen in (False, True):
        module = Grouped({"backbone.0": 1e-2, "heads": 1e-2}, METHODS[method] and METHODS[method]())
        module.backbone[2].requires_grad_(not frozen)
        fit(module, make_batches(6), callbacks=[teleporter()])
        found.append(values_of(module))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


class Availability(L.Callback):
    def __init__(self) -> None:
        self.columns: list[int | None] = []

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        gradients = pl_module.task_gradients
        self.columns.append(None if gradients is None else gradients.matrix.shape[1])


class Finetuning(BackboneFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen")
@pytest.mark.parametrize("method", METHODS)
def test_a_backbone_that_is_frozen_first_is_shared_when_it_is_unfrozen(method: str) -> None:
    callback, seen = teleporter(), Availability()
    module = Net(METHODS[method] and METHODS[method]())
    module.configure_optimizers = lambda: torch.optim.Adam(  # type: ignore[method-assign]
        [parameter for parameter in module.parameters() if parameter.requires_grad], lr=1e-2
    )
    finetuning = Finetuning(unfreeze_backbone_at_epoch=1, verbose=False, backbone_initial_lr=1e-2)
    fit(module, make_batches(3), callbacks=[finetuning, callback, seen], max_epochs=2)
    assert seen.columns[:3] == [None] * 3
    assert seen.columns[3:] == [5 * 6 + 6 + 6 * 4 + 4] * 3
    assert {report.epoch for report in callback.reports} == {1}
    assert any(report.accepted for report in callback.reports)


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_phase_has_no_task_gradients_and_no_teleports(method: str) -> None:
    module, callback = Net(METHODS[method] and METHODS[method]()), teleporter()
    module.backbone.requires_grad_(False)
    fit(module, make_batches(4), callbacks=[callback])
    assert callback.reports == []
    assert module.task_gradients is None
    moved = changes(module, Net())
    assert all((change == 0) == name.startswith("backbone") for name, change in moved.items())


def test_learning_rates_that_change_are_followed() -> None:
    class Switched(Grouped):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            for index, group in enumerate(self.trainer.optimizers[0].param_groups):
                group["lr"] = 1e-2 * (batch_idx % 3 != index)

    callback, seen = teleporter(), Availability()
    module = Switched({"backbone.0": 1.0, "backbone.2": 1.0, "heads": 1.0}, UPGrad())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, make_batches(6), callbacks=[callback, seen])
    first, second = 5 * 6 + 6, 6 * 4 + 4
    assert seen.columns == [second, first, first + second] * 2
    assert any(report.accepted for report in callback.reports)


def test_a_learning_rate_of_zero_for_all_is_a_phase_without_task_gradients() -> None:
    class WarmUp(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=torch.tensor(0.1))
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 2, 1.0))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    callback, seen = teleporter(), Availability()
    fit(WarmUp(UPGrad()), make_batches(4), callbacks=[callback, seen])
    assert [columns is None for columns in seen.columns] == [True, False, False, False]
    assert len(callback.reports) == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["backbone", "backbone.0"])
@pytest.mark.parametrize("first", [True, False])
def test_parameters_may_be_frozen_between_micro_batches(method: str, part: str, first: bool) -> None:
    class Freezes(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.get_submodule(part).requires_grad_((batch_idx % 4 < 2) == first)

    module, callback = Freezes(METHODS[method] and METHODS[method]()), teleporter()
    fit(module, make_batches(8), accumulate_grad_batches=4, callbacks=[callback])
    assert bool(torch.isfinite(values_of(module)).all())
    assert not any(report.accepted for report in callback.reports) or not first


@pytest.mark.parametrize("method", METHODS)
def test_a_task_whose_parameters_are_all_frozen_rests(method: str) -> None:
    module, callback = Net(METHODS[method] and METHODS[method]()), teleporter()
    module.backbone.requires_grad_(False)
    module.heads["ink"].requires_grad_(False)
    fit(module, make_batches(4), callbacks=[callback])
    moved = changes(module, Net())
    assert {name for name, change in moved.items() if change} == {
        f"heads.{task}.0.{part}" for task in ("left", "right") for part in ("weight", "bias")
    }


def test_an_optimizer_without_a_learning_rate_trains_all_it_has() -> None:
    class Unrated(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] = 0.05
            result = super().step(closure)
            for group in self.param_groups:
                del group["lr"]
            return result

    module, callback = Net(UPGrad()), teleporter()
    optimizer = Unrated(module.parameters())
    for group in optimizer.param_groups:
        del group["lr"]
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    fit(module, make_batches(4), callbacks=[callback])
    assert any(report.accepted for report in callback.reports)


def test_a_search_that_reaches_nothing_that_is_trained_waits() -> None:
    callback = teleporter(search=LevelSetSearch(target_modules=["backbone.2"]))
    module = Grouped({"backbone.0": 1e-2, "heads": 1e-2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, make_batches(3), callbacks=[callback])
    assert {report.reason for report in callback.reports} == {
        "the search reaches no parameter that the optimizer trains now"
    }


def test_a_loss_that_branches_off_before_the_trained_part_has_a_row_of_zeros() -> None:
    class Branched(Grouped):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            early = self.backbone[0](batch["x"]).tanh()[:, :4]
            return self.losses(batch) | {"right": self.losses(batch, early)["right"]}

    module = Branched({"backbone.2": 1e-2, "heads": 1e-2}, UPGrad())
    fit(module, make_batches(4), callbacks=[teleporter()])
    gradients = module.task_gradients
    assert [bool(row.any()) for row in gradients.matrix] == [True, False, True]
    assert gradients.with_gradient.names == ("left", "ink")


def test_the_learning_rate_finder_still_works(tmp_path: Any) -> None:
    class Tuned(Net):
        lr = 1e-3

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = Tuned(UPGrad())
    fit(
        module,
        make_batches(8),
        callbacks=[LearningRateFinder(num_training_steps=5, update_attr=True), teleporter()],
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
