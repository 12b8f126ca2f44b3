"""Task gradients of the features: the outputs of the shared modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import Parameter

from lightning_cost._training.autograd import leaves_beyond, nodes_below
from lightning_cost._training.shared import shared_modules
from lightning_cost.gradients import TaskGradients

__all__: list[str] = []


@contextmanager
def captured_outputs(module: Any) -> Iterator[Callable[[], list[Tensor]]]:
    """Note what the shared modules of a LightningModule return while they are called.

    Yields:
        A function that returns the tensors with a graph, without those that other ones are computed from.
    """
    found: list[Tensor] = []

    def note(part: nn.Module, inputs: Any, output: Any) -> None:
        found.extend(tensor for tensor in _tensors(output) if tensor.requires_grad)

    parts = shared_modules(module).values()
    inner = {child for part in parts for child in part.modules() if child is not part}
    handles = [part.register_forward_hook(note) for part in parts if part not in inner]
    try:
        yield lambda: _outermost(found)
    finally:
        for handle in handles:
            handle.remove()


def feature_rows(
    losses: Mapping[str, Tensor], names: Sequence[str], features: Sequence[Tensor], scale: float, device: torch.device
) -> TaskGradients:
    """The gradients of the task losses with respect to the features. The graphs are kept.

    Args:
        losses: The losses by task.
        names: All tasks. One without a loss has a row of zeros.
        features: The features. A process without losses may have none.
        scale: The factor of a gradient scaler, which keeps gradients of half precision from vanishing meanwhile.
        device: The device of the rows where there are no features.

    Returns:
        One row per task, in at least single precision. The columns are the elements of the features, concatenated.
    """
    if not features:
        return TaskGradients(names, torch.zeros(len(names), 0, device=device))
    rows = []
    for name in names:
        loss = losses.get(name)
        gradients: Sequence[Tensor | None] = (None,) * len(features)
        if loss is not None and loss.requires_grad:
            outer = torch.full_like(loss, scale)
            gradients = torch.autograd.grad(loss, features, outer, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, features, strict=True)
        pieces = [torch.zeros_like(z) if g is None else g for g, z in pairs]
        rows.append(torch.cat([piece.reshape(-1).to(_wide(piece)) for piece in pieces]))
    matrix = torch.stack(rows)
    return TaskGradients(names, matrix if scale == 1 else matrix.div_(scale))


def with_gradient(features: Sequence[Tensor], change: Tensor) -> Tensor:
    """A term with the value 0 that adds ``change`` to the gradient of the features.

    Args:
        features: The features.
        change: What is added, of the length of a row of :func:`feature_rows`.
    """
    if not features:
        return change.sum()
    pieces = change.split([feature.numel() for feature in features])
    terms = [(z.to(piece.dtype) * piece.view(z.shape)).sum() for z, piece in zip(features, pieces, strict=True)]
    term = torch.stack(terms).sum()
    return term - term.detach()


def check_features(
    module: nn.Module, losses: Mapping[str, Tensor], features: Sequence[Tensor], shared: Sequence[Parameter]
) -> None:
    """Refuse losses that reach shared parameters by another way than through the features.

    Raises:
        MisconfigurationException: If there is one, or if there are no features.
    """
    kind, named = type(module).__name__, getattr(module, "shared_module", "")
    if not features:
        raise MisconfigurationException(
            f"`task_gradients_of='features'` takes the outputs of `shared_module={named!r}`, but `task_losses` of"
            f" {kind} did not call it, or its output holds no tensor with a graph. Call the module itself, not one of"
            " its methods, and return tensors, or containers of tensors. Or set `task_gradients_of='parameters'`."
        )
    names = {parameter: name for name, parameter in module.named_parameters()}
    for task, loss in losses.items():
        reached = {id(leaf) for leaf in leaves_beyond(loss, features)}
        beyond = [parameter for parameter in shared if id(parameter) in reached]
        if beyond:
            raise MisconfigurationException(
                f"`task_gradients_of='features'`: the loss of task {task!r} reaches the shared parameter"
                f" `{names[beyond[0]]}` by another way than through the output of `shared_module={named!r}`. Return"
                " everything that the heads use from the shared module, or set `task_gradients_of='parameters'`."
            )


def _outermost(features: Sequence[Tensor]) -> list[Tensor]:
    """The features that no other one is computed from."""
    unique = list({id(feature): feature for feature in features}.values())
    if len(unique) < 2:
        return unique
    edges = [get_gradient_edge(feature) for feature in unique]
    below: list[set[Node]] = [nodes_below(edge.node) for edge in edges]
    return [
        feature
        for index, feature in enumerate(unique)
        if not any(edges[index].node in nodes for other, nodes in enumerate(below) if other != index)
    ]


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors of floating-point numbers in what a module returned."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    if depth > 8 or isinstance(value, (str, bytes, nn.Module)):
        return
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (list, tuple, set)):
        parts = value
    else:
        with suppress(TypeError):
            parts = vars(value).values()
    for part in parts:
        yield from _tensors(part, depth + 1)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
