"""Teleports of modules with tied, frozen, nested or recurrent layers, and of other batches and optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_cost import PenaltySearch
from tests.support.nets import TASKS, Net, fit, make_batches, make_mlp
from tests.support.teleporting import assert_same, snapshot, teleporter


class SingleLinear(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 4)


class SharedTwice(Net):
    """The same layer is used twice, and registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(5, 5)
        self.backbone = nn.Sequential(layer, nn.Tanh(), layer, make_mlp(5, 4))


class TiedWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        one, two = nn.Linear(5, 5), nn.Linear(5, 5)
        two.weight = one.weight
        self.backbone = nn.Sequential(one, nn.Tanh(), two, make_mlp(5, 4))


class PartlyFrozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone[0].requires_grad_(False)


class TwoModules(Net):
    shared_module = ("backbone", "neck.inner")

    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.ModuleDict({"inner": nn.Linear(4, 4), "outer": nn.Identity()})

    def features(self, batch: Any) -> torch.Tensor:
        return self.neck["inner"](self.backbone(batch["x"]).tanh()).tanh()


class TupleBatches(Net):
    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        return self.losses({"x": batch[0], **dict(zip(TASKS, batch[1], strict=True))})


class ParameterGroups(Net):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.heads.parameters(), "lr": 0.1}, {"params": self.backbone.parameters(), "lr": 0.01}]
        optimizer = torch.optim.AdamW(groups)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.GRU(5, 4, batch_first=True)

    def features(self, batch: Any) -> torch.Tensor:
        return self.backbone(batch["x"][:, None])[0][:, 0]


@pytest.mark.parametrize(
    "make", [SingleLinear, SharedTwice, TiedWeights, PartlyFrozen, TwoModules, TupleBatches, ParameterGroups, Recurrent]
)
@pytest.mark.parametrize("settings", [{}, {"search": PenaltySearch(steps=3, lr=1e-2)}], ids=["level_set", "penalty"])
def test_unusual_modules(make: Any, settings: dict[str, Any]) -> None:
    if make is Recurrent and settings:
        pytest.skip("PEFT reaches no recurrent layer, which another test covers")
    torch.manual_seed(0)
    module = make()
    batches: list[Any] = make_batches(6)
    if make is TupleBatches:
        batches = [(batch["x"], tuple(batch[task] for task in TASKS)) for batch in batches]
    before = snapshot(module)
    callback = teleporter(history="paper" if make is ParameterGroups else "keep", **settings)
    fit(module, batches, callbacks=[callback])
    after = snapshot(module)
    assert any(report.accepted for report in callback.reports)
    for kept in ("identities", "requires_grad", "modules", "keys"):
        assert_same(after[kept], before[kept])
    frozen = [name for name, trainable in before["requires_grad"].items() if not trainable]
    assert_same([after["parameters"][n] for n in frozen], [before["parameters"][n] for n in frozen])
