"""The gradient of one task, and which parameters its graph reaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter

__all__: list[str] = []


def task_gradient(
    loss: Tensor, shared: Sequence[Parameter], scale: float = 1.0, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """The gradient of ``scale * loss`` with respect to each shared parameter. The graph is kept.

    Returns:
        One gradient per parameter; ``None`` where the graph of the loss does not reach the parameter.
    """
    if not loss.requires_grad:
        return (None,) * len(shared)
    return torch.autograd.grad(
        loss,
        shared,
        grad_outputs=None if scale == 1.0 else torch.full_like(loss, scale),
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
    )


def reached_leaves(loss: Tensor) -> set[Tensor]:
    """The leaves of the graph of a loss, found without differentiating it."""
    if not loss.requires_grad:
        return set()
    start = get_gradient_edge(loss).node
    leaves, seen, pending = set(), {start}, [start]
    while pending:
        node = pending.pop()
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.add(node.variable)  # type: ignore[attr-defined]
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        pending.extend(new)
    return leaves
