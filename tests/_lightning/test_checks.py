"""Which Trainers are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from torchjd.aggregation import UPGrad

from lightning_cost._lightning.checks import check_strategy
from tests.support.nets import Net, fit, make_batches, make_trainer
from tests.support.teleporting import teleporter


def _uninitialized(kind: type[Strategy]) -> Strategy:
    """Without its package or hardware a strategy cannot be made; the refusal looks at the class alone."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    "strategy",
    [
        FSDPStrategy(),
        ModelParallelStrategy(),
        _uninitialized(DeepSpeedStrategy),
        _uninitialized(SingleDeviceXLAStrategy),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_sharded_and_lazy_strategies_are_refused_by_name(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", strategy)
    with pytest.raises(
        MisconfigurationException, match=rf"got strategy {type(strategy).__name__}\. Use a single device"
    ):
        check_strategy(trainer)


def test_averaged_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", DDPStrategy(model_averaging_period=2))
    with pytest.raises(MisconfigurationException, match="`model_averaging_period`"):
        check_strategy(trainer)


class OwnDevice(SingleDeviceStrategy):
    """A single device, as users subclass it."""


@pytest.mark.parametrize(("method", "callbacks"), [(UPGrad(), False), (None, True)])
def test_a_fit_with_an_unknown_strategy_ends_before_it_begins(
    method: Any, callbacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Net(method)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    # Whatever else it is, it is no subclass of what is supported.
    monkeypatch.setattr("lightning_cost._lightning.checks.SingleDeviceStrategy", OwnDevice)
    with pytest.raises(MisconfigurationException, match="got strategy SingleDeviceStrategy"):
        fit(module, make_batches(2), callbacks=[teleporter()] if callbacks else [])
    assert all(torch.equal(one, two) for one, two in zip(module.parameters(), before, strict=True))


def test_subclasses_of_what_is_supported_train() -> None:
    callback = teleporter()
    fit(Net(UPGrad()), make_batches(4), strategy=OwnDevice("cpu"), callbacks=[callback])
    assert len(callback.reports) == 4


def test_manual_optimization_is_refused() -> None:
    module = Net(UPGrad())
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="needs automatic optimization"):
        fit(module, make_batches(2))
