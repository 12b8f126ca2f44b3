"""Rule 7: interrupting and resuming equals not interrupting, to the bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torchjd.aggregation import UPGrad

from lightning_cost import ConflictAlignment, PenaltySearch, RandomDirection, SymmetryTeleportCallback
from lightning_cost.searches import LevelSetSearch
from tests.helpers import Net, PlainNet, make_batches, make_trainer
from tests.teleporting import SaveAt, StatefulBatches, assert_same, final_state, teleporter, without_time

BATCHES = 5

SETTINGS = {
    "level set": {},
    "random direction": {"objective": RandomDirection()},
    "penalty, sharpness": {
        "search": PenaltySearch(steps=3, lr=1e-2, gamma=10.0),
        "objective": "sharpness",
        "tolerance": None,
    },
    "3 batches": {"num_batches": 3},
    "paper history": {"history": "paper"},
    "2 an epoch": {"max_per_epoch": 2},
    "every 2nd step": {"check_every_n_steps": 2},
    "2 steps, double backward": {
        "search": LevelSetSearch(steps=2),
        "objective": ConflictAlignment(derivative="double_backward"),
    },
}


def run(method: Any, settings: dict[str, Any], extra: list[Any], ckpt_path: Any = None) -> tuple[Any, ...]:
    torch.manual_seed(5)
    module = Net(method() if method else None)
    module.make_optimizer = partial(torch.optim.Adam, lr=1e-2)
    callback = teleporter(**settings)
    trainer = make_trainer(max_epochs=3, callbacks=[callback, *extra])
    trainer.fit(module, StatefulBatches(make_batches(BATCHES)), ckpt_path=ckpt_path)
    return module, trainer, callback


@pytest.mark.parametrize("step", [BATCHES, BATCHES + 2, 2 * BATCHES + 1], ids="after step {}".format)
@pytest.mark.parametrize("method", [None, UPGrad], ids=["LS", "UPGrad"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_resume(settings: dict[str, Any], method: Any, step: int, tmp_path: Any) -> None:
    path = tmp_path / "interrupted.ckpt"
    module, trainer, callback = run(method, settings, [SaveAt(path, step)])
    assert sum(report.accepted for report in callback.reports) >= 3
    resumed_module, resumed_trainer, resumed = run(method, settings, [], ckpt_path=path)
    assert resumed_trainer.global_step == trainer.global_step == 3 * BATCHES
    assert_same(final_state(resumed_module, resumed_trainer), final_state(module, trainer))
    assert_same(without_time(resumed.reports), without_time(callback.reports, traced_from=step))


def test_the_checkpoint_is_plain_and_loads_without_the_mixin(tmp_path: Any) -> None:
    path = tmp_path / "saved.ckpt"
    _, _, callback = run(UPGrad, {"num_batches": 2}, [SaveAt(path, BATCHES + 1)])
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(PlainNet().state_dict())
    PlainNet().load_state_dict(checkpoint["state_dict"])
    restored = SymmetryTeleportCallback()
    restored.load_state_dict(checkpoint["callbacks"][callback.state_key])
    assert_same(without_time(restored.reports), without_time(callback.reports[: BATCHES + 1], traced_from=BATCHES + 1))
