"""Rule 6: whatever happens in the middle of a teleport, the module is as it was."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torchjd.aggregation import UPGrad

from lightning_cost import ConflictAlignment, LevelSetSearch, PenaltySearch, SampledSharpness
from lightning_cost.adapters import PeftAdapter
from lightning_cost.landscape import Landscape
from tests.helpers import fit, make_batches
from tests.teleporting import NoisyNet, assert_same, snapshot, teleporter

SEARCHES = {
    "level set": {},
    "level set, 3 steps": {"search": LevelSetSearch(steps=3)},
    "level set, double backward": {"objective": ConflictAlignment(derivative="double_backward")},
    "level set, 3 batches": {"num_batches": 3},
    "penalty": {"search": PenaltySearch(steps=3, lr=1e-2)},
    "penalty, sharpness": {"search": PenaltySearch(steps=2, lr=1e-2), "objective": SampledSharpness(samples=2)},
}


class FragileNet(NoisyNet):
    """Fails, or has losses that are not finite, at the n-th evaluation of the losses within a teleport."""

    def __init__(self, fault: Any, evaluation: int) -> None:
        super().__init__(UPGrad())
        self.fault = fault
        self.countdown = evaluation
        self.teleporting = False
        self.struck = False

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = super().task_losses(batch, batch_idx)
        if self.teleporting and not self.struck:
            self.countdown -= 1
            if self.countdown == 0:
                self.struck = True
                if isinstance(self.fault, float):
                    return {**losses, "right": losses["right"] * self.fault}
                raise self.fault
        return losses


class Begin(L.Callback):
    """Marks where teleports begin, from the third step on, and takes a snapshot of each beginning."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        pl_module.teleporting = trainer.global_step >= 2
        self.before = snapshot(pl_module)


class End(L.Callback):
    """Marks where teleports end, and keeps what is there after the first one that was struck."""

    def __init__(self, begin: Begin | None = None) -> None:
        self.begin = begin
        self.struck: tuple[int, dict[str, Any], dict[str, Any]] | None = None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if pl_module.struck and self.struck is None and self.begin is not None:
            self.struck = trainer.global_step, self.begin.before, snapshot(pl_module)
        pl_module.teleporting = False


@pytest.mark.parametrize("evaluation", range(1, 8))
@pytest.mark.parametrize("settings", SEARCHES.values(), ids=SEARCHES)
def test_an_exception_leaves_everything_as_it_was(settings: dict[str, Any], evaluation: int) -> None:
    module, begin = FragileNet(RuntimeError("out of memory"), evaluation), Begin()
    callback = teleporter(**settings)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, make_batches(12), callbacks=[begin, callback, End()])
    assert_same(snapshot(module), begin.before)
    assert not callback.reports[-1].accepted
    assert callback.reports[-1].reason == "RuntimeError: out of memory"
    module.teleporting = False
    fit(module, make_batches(3), callbacks=[teleporter()])


def test_an_interrupt_leaves_everything_as_it_was() -> None:
    module, begin = FragileNet(KeyboardInterrupt(), 3), Begin()
    callback = teleporter()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, make_batches(6), callbacks=[begin, callback, End()])
    assert_same(snapshot(module), begin.before)
    assert callback.reports[-1].reason.startswith("KeyboardInterrupt")


@pytest.mark.parametrize("evaluation", range(1, 6))
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [SEARCHES["level set"], SEARCHES["penalty"]], ids=["level set", "penalty"])
def test_losses_that_are_not_finite_end_no_training(settings: dict[str, Any], fault: float, evaluation: int) -> None:
    module = FragileNet(fault, evaluation)
    callback = teleporter(**settings)
    begin = Begin()
    end = End(begin)
    trainer = fit(module, make_batches(6), callbacks=[begin, callback, end])
    assert trainer.global_step == 6
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert end.struck is not None
    step, before, after = end.struck
    report = callback.reports[step]
    assert all(math.isfinite(value) for value in report.losses_after.values())
    if report.accepted:
        assert report.drift <= 0.02
    else:
        assert_same(after, before)


STAGES = [
    (Landscape, "move_to", {}),
    (Landscape, "gradient", {}),
    (Landscape, "point", {}),
    (PeftAdapter, "__init__", {"search": PenaltySearch(steps=2, lr=1e-2)}),
    (PeftAdapter, "change", {"search": PenaltySearch(steps=2, lr=1e-2)}),
    (torch.optim.Adam, "step", {"search": PenaltySearch(steps=2, lr=1e-2)}),
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("owner", "name", "settings"), STAGES, ids=[f"{o.__name__}.{n}" for o, n, _ in STAGES])
def test_a_fault_in_any_part_leaves_everything_as_it_was(
    owner: Any, name: str, settings: dict[str, Any], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part fails when it is entered, or when it has done its work."""
    original = getattr(owner, name)

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Restoring the parameters must work, whatever failed before.
        monkeypatch.setattr(owner, name, original)
        if late:
            original(self, *args, **kwargs)
        raise RuntimeError("broken part")

    class Sabotage(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            self.before = snapshot(pl_module)
            if trainer.global_step == 2:
                monkeypatch.setattr(owner, name, failing)

    module, sabotage = NoisyNet(), Sabotage()
    callback = teleporter(**settings)
    with pytest.raises(RuntimeError, match="broken part"):
        fit(module, make_batches(4), callbacks=[sabotage, callback])
    assert_same(snapshot(module), sabotage.before)
    assert callback.reports[-1].reason == "RuntimeError: broken part"
