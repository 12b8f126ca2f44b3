"""The gradient of one task, and which parameters its graph reaches."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import Parameter

__all__: list[str] = []


def task_gradient(
    loss: Tensor, shared: Sequence[Parameter], scale: float = 1.0, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """The gradient of ``scale * loss`` with respect to each shared parameter. The graph is kept.

    Returns:
        One gradient per parameter; ``None`` where the graph of the loss does not reach the parameter.
    """
    # A parameter may have been frozen since the window of micro-batches began.
    trained = [parameter for parameter in shared if parameter.requires_grad]
    if not loss.requires_grad or not trained:
        return (None,) * len(shared)
    gradients = iter(
        torch.autograd.grad(
            loss,
            trained,
            grad_outputs=None if scale == 1.0 else torch.full_like(loss, scale),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return tuple(next(gradients) if parameter.requires_grad else None for parameter in shared)


def reached_leaves(loss: Tensor) -> set[Tensor]:
    """The leaves of the graph of a loss, found without differentiating it."""
    nodes = _nodes_of(loss)
    return {node.variable for node in nodes if node.name() == "torch::autograd::AccumulateGrad"}  # type: ignore[attr-defined]


def is_checkpointed(loss: Tensor) -> bool:
    """Whether the graph of a loss runs through reentrant activation checkpointing, which hides what it reaches."""
    return any("CheckpointFunction" in node.name() for node in _nodes_of(loss))


def unreached_cause(loss: Tensor) -> str:
    """Why the graph of a loss reaches no shared parameter, and what to do."""
    if is_checkpointed(loss):
        return (
            "It runs through reentrant activation checkpointing, which hides the parameters. Pass"
            " `use_reentrant=False` to `torch.utils.checkpoint`."
        )
    if reached_leaves(loss):
        return (
            "It reaches other parameters only. Compute the loss from the output of `shared_module` without detaching"
            " it, or name the module that the tasks share in `shared_module`. Reentrant activation checkpointing"
            " detaches it as well: pass `use_reentrant=False`."
        )
    return "It reaches no parameter at all. Compute the loss from the output of the network."


def leaves_beyond(loss: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of the graph of a loss that it reaches without passing through any of the features."""
    if not loss.requires_grad:
        return []
    border = {get_gradient_edge(feature).node for feature in features}
    nodes = nodes_below(get_gradient_edge(loss).node, border)
    return [node.variable for node in nodes if node.name() == "torch::autograd::AccumulateGrad"]  # type: ignore[attr-defined]


def _nodes_of(loss: Tensor) -> set[Node]:
    return nodes_below(get_gradient_edge(loss).node) if loss.requires_grad else set()


def nodes_below(start: Node, border: Collection[Node] = ()) -> set[Node]:
    """A node of a graph and all that it leads to, but for what lies beyond the nodes of a border."""
    if start in border:
        return set()
    seen, pending = {start}, [start]
    while pending:
        node = pending.pop()
        new = {following for following, _ in node.next_functions if following is not None} - seen - set(border)
        seen |= new
        pending.extend(new)
    return seen
