"""Gradients of the outputs of shared modules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_cost._training.features import captured_outputs, feature_rows, with_gradient
from tests.support.nets import Net, make_batches


def test_rows_are_the_gradients_of_the_features_and_a_missing_task_has_zeros() -> None:
    module, (batch,) = Net(), make_batches(1)
    with captured_outputs(module) as outputs:
        losses = module.losses(batch)
    (features,) = outputs()
    del losses["right"]
    for scale in (1.0, 256.0):
        rows = feature_rows(losses, ["left", "right", "ink"], [features], scale, features.device)
        assert not rows.matrix[1].any()
        for name, row in (("left", rows.matrix[0]), ("ink", rows.matrix[2])):
            (expected,) = torch.autograd.grad(losses[name], features, retain_graph=True)
            torch.testing.assert_close(row.view_as(expected), expected)
    assert feature_rows({}, ["left", "right"], [], 1.0, features.device).matrix.shape == (2, 0)


def test_a_change_is_added_to_the_gradient_and_not_to_the_value() -> None:
    leaf = torch.ones(2, 3, requires_grad=True)
    features, change = [leaf * 2, leaf.half()[0] * 3], torch.arange(9.0)
    term = with_gradient(features, change)
    assert term.item() == 0
    term.backward()
    expected = 2 * change[:6].view(2, 3)
    expected[0] += 3 * change[6:]
    torch.testing.assert_close(leaf.grad, expected)


class Rich(nn.Module):
    """Returns whatever modules return."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(2, 2), wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.linear(x))


def test_outputs_are_found_in_containers_and_inner_ones_are_left_out() -> None:
    for wrap in (
        lambda y: y,
        lambda y: (y, 3, None),
        lambda y: {"y": [y], "name": "x"},
        lambda y: SimpleNamespace(y=y, count=torch.tensor(1)),
    ):
        owner: Any = SimpleNamespace(
            shared_module=["first", "second"], first=Rich(lambda y: y), second=Rich(wrap), _modules={}
        )
        with captured_outputs(owner) as outputs:
            owner.second(owner.first(torch.ones(1, 2)))
            # Twice: both are features.
            owner.second(owner.first(torch.ones(1, 2)))
            owner.second(torch.ones(1, 2).requires_grad_(False))
        assert len(outputs()) == 3
        assert not owner.first._forward_hooks
