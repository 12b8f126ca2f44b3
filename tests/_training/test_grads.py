"""Noticing that somebody has changed ``.grad``."""

from __future__ import annotations

import torch

from lightning_cost._training.grads import GradMark


def test_a_mark_knows_another_tensor_a_write_and_a_scale() -> None:
    one, two = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    one.grad, two.grad = torch.ones(2), None
    mark = GradMark([one, two])
    assert mark.edited() is None
    two.grad = torch.zeros(2)
    assert mark.edited() is two
    two.grad = None
    one.grad.mul_(8)
    assert mark.edited() is one
    assert mark.edited(factor=8.0) is None


def test_a_mark_knows_a_write_that_no_version_counts() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    mark = GradMark([parameter])
    parameter.grad.data[0] = 0.0
    assert mark.edited() is parameter


def test_a_mark_knows_sparse_gradients() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    mark = GradMark(table.parameters())
    assert mark.edited() is None
    table.weight.grad = table.weight.grad * 2
    assert mark.edited() is table.weight


def test_without_norms_a_write_through_data_is_not_noticed() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    mark = GradMark([parameter])
    parameter.grad.data.mul_(2)
    assert mark.edited(by_norm=False) is None
    assert mark.edited() is parameter
    parameter.grad.mul_(2)
    assert mark.edited(by_norm=False) is parameter
