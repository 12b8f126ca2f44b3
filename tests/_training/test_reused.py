"""Task weights that hold for several steps."""

from __future__ import annotations

import pytest
import torch

from lightning_cost._training.reused import TaskWeights, weighted_total


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_shared_parameters_follow_the_weighted_sum_and_the_others_the_sum(scale: float) -> None:
    shared = torch.tensor([1.0, 2.0], requires_grad=True)
    heads = {name: torch.tensor(value, requires_grad=True) for name, value in (("a", 3.0), ("b", 5.0))}
    unused = torch.ones(2, requires_grad=True)
    losses = {name: (shared * head).square().sum() for name, head in heads.items()}
    total = weighted_total(losses, {"a": 0.5, "b": 0.0}, [*heads.values(), unused], scale)
    assert total.item() == pytest.approx(sum(loss.item() for loss in losses.values()))
    total.backward()
    torch.testing.assert_close(shared.grad, 0.5 * 2 * 9 * shared.detach())
    for head in heads.values():
        torch.testing.assert_close(head.grad, 2 * head.detach() * 5)
    assert unused.grad is None


def test_weights_hold_for_so_many_steps() -> None:
    weights = TaskWeights()
    assert weights.for_step(["a", "b"], 3) is None
    weights.renew(["a"], torch.tensor([1.0]))
    assert weights.for_step(["a", "b"], 3) is None
    weights.renew(["a", "b"], torch.tensor([1.0, 2.0]))
    assert weights.for_step(["a", "b"], 1) is None
    assert weights.for_step([], 3) is None
    again = TaskWeights()
    again.load_state_dict(weights.state_dict())
    for found in (weights, again):
        for _ in range(2):
            assert found.for_step(["a", "b"], 3) == {"a": 1.0, "b": 2.0}
            found.age += 1
        assert found.for_step(["a", "b"], 3) is None
        # A task that is missing where weights are renewed keeps its last one.
        found.renew(["b"], torch.tensor([4.0]))
        assert found.for_step(["a", "b"], 3) == {"a": 1.0, "b": 4.0}
