"""How often a step waits for a GPU: each read of a tensor lets it run empty."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torchjd.aggregation import MGDA, CAGrad, UPGrad
from torchjd.scalarization import FAMO, UW

from lightning_cost import DominatedConflict
from lightning_cost._training import engine
from tests.support.host_reads import counted_reads
from tests.support.nets import TASKS, Batch, Net, PlainNet, fit, grads_of, make_batches
from tests.support.teleporting import SaveAt, teleporter

pytestmark = pytest.mark.slow

NAMES = (*TASKS, "edge")


class Agreeing(Net):
    """Tasks without conflict, so that a check is all that a callback does."""

    def __init__(self, mtl_method: Any = None, **attributes: Any) -> None:
        super().__init__(mtl_method, NAMES)
        for name, value in attributes.items():
            setattr(self, name, value)

    def task_losses(self, batch: Batch, batch_idx: int) -> Any:
        output = self.features(batch).square().mean()
        return {
            name: output * (index + 1) + head(self.features(batch)).square().mean() * 1e-4
            for index, (name, head) in enumerate(self.heads.items())
        }


def reads_a_step(monkeypatch: pytest.MonkeyPatch, make: Any, make_callback: Any = None) -> Counter[str]:
    """The reads of ten steps in the middle of a run."""
    counts = []
    for number in (10, 20):
        torch.manual_seed(0)
        callbacks = [] if make_callback is None else [make_callback()]
        with counted_reads(monkeypatch) as reads:
            fit(make(), make_batches(number, NAMES), callbacks=callbacks)
        counts.append(reads)
        assert all(not callback.reports for callback in callbacks)
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    ("make", "make_callback", "most"),
    [
        (PlainNet, None, 0),
        (Agreeing, None, 0),
        (partial(Agreeing, UPGrad()), None, 2),
        (partial(Agreeing, MGDA()), None, 2),
        (partial(Agreeing, CAGrad(c=0.5)), None, 2),
        (partial(Agreeing, UPGrad(), weights_every=10**6), None, 0),
        (partial(Agreeing, UPGrad(), task_gradients_of="features"), None, 2),
        (partial(Agreeing, UW(4)), None, 2),
        (lambda: Agreeing(FAMO(4)), None, 2),
        (Agreeing, partial(teleporter, trigger="dominated"), 2),
        (Agreeing, partial(teleporter, trigger=DominatedConflict(all_tasks_every=5)), 2),
        (partial(Agreeing, UPGrad()), partial(teleporter, trigger="dominated"), 2),
    ],
    ids=[
        "plain", "mean", "UPGrad", "MGDA", "CAGrad", "weights_every", "features", "UW", "FAMO", "check", "lazy check",
        "UPGrad, check",
    ],
)  # fmt: skip
def test_a_step_waits_at_most_twice(monkeypatch: pytest.MonkeyPatch, make: Any, make_callback: Any, most: int) -> None:
    reads = reads_a_step(monkeypatch, make, make_callback)
    # FAMO's own optimizer counts its steps on the CPU.
    ours = {line: count for line, count in reads.items() if "/torch/optim/" not in line}
    assert sum(ours.values()) <= most * 10, ours


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are looked at late, as on a GPU."""
    monkeypatch.setattr(engine, "waits_for", lambda losses: True)


class Overflowing(Net):
    """The loss of one task is infinite in one step."""

    def __init__(self, mtl_method: Any = None, at: int = 2) -> None:
        super().__init__(mtl_method)
        self.at = at
        self.seen = 0

    def task_losses(self, batch: Batch, batch_idx: int) -> Any:
        self.seen = batch_idx
        losses = super().task_losses(batch, batch_idx)
        return {**losses, "right": losses["right"] / (batch_idx != self.at)}


def test_a_late_look_names_the_task_one_step_later(waiting: None) -> None:
    module = Overflowing()
    with pytest.raises(ValueError, match=r"step before of task 'right' is not finite.*hold the result"):
        fit(module, make_batches(6))
    assert module.seen == 2


@pytest.mark.parametrize("method", [UPGrad, partial(UW, 3), MGDA])
def test_a_method_never_sees_it(waiting: None, method: Any) -> None:
    module = Overflowing(method())
    with pytest.raises(ValueError, match=r"The loss of task 'right' is not finite.*as they were before"):
        fit(module, make_batches(6))
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert all(torch.isfinite(grad).all() for grad in grads_of(module))


def test_no_checkpoint_is_saved_with_it(waiting: None, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="task 'right' is not finite"):
        fit(Overflowing(), make_batches(6), callbacks=[SaveAt(tmp_path / "a.ckpt", 3)])
    assert not (tmp_path / "a.ckpt").exists()


def test_the_last_step_is_looked_at_too(waiting: None) -> None:
    with pytest.raises(ValueError, match="task 'right' is not finite"):
        fit(Overflowing(at=5), make_batches(6))
