"""Looking at losses without waiting for them."""

from __future__ import annotations

import pytest
import torch

from lightning_cost._training.late import LateCheck, waits_for


def losses(right: float) -> dict[str, torch.Tensor]:
    return {"left": torch.tensor(1.0), "right": torch.tensor(right)}


def test_finite_losses_pass() -> None:
    LateCheck(losses(2.0), step=3).finish(step=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("now", "message"), [(3, "The loss of task 'right'.*as they were"), (4, "step before of task 'right'.*hold the")]
)
def test_the_task_is_named_and_whether_the_step_was_taken(value: float, now: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LateCheck(losses(value), step=3).finish(now)


def test_nothing_waits_for_a_cpu() -> None:
    assert not waits_for(losses(1.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_losses_are_copied_when_the_gpu_gets_there() -> None:
    on_gpu = {name: loss.cuda() for name, loss in losses(float("nan")).items()}
    assert waits_for(on_gpu)
    check = LateCheck(on_gpu, step=0)
    on_gpu["right"].fill_(1.0)
    with pytest.raises(ValueError, match="'right'"):
        check.finish(1)
