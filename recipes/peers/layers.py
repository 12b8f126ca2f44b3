"""What the searches of this package share: layers, their inputs, and a vector of shared parameters in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_cost import SearchContext

__all__ = ["HiddenLayer", "hidden_layers", "objective_gradient", "pieces", "reach_of", "watched_inputs"]


@dataclass(frozen=True)
class HiddenLayer:
    """Two `nn.Linear` of an `nn.Sequential` with an activation between them."""

    first: nn.Linear
    activation: nn.Module
    second: nn.Linear


def hidden_layers(modules: Mapping[str, nn.Module], activations: tuple[type[nn.Module], ...]) -> list[HiddenLayer]:
    """The hidden layers with one of the activations, in the order of the network.

    Raises:
        ValueError: If there is none.
    """
    found = []
    for module in modules.values():
        for chain in (part for part in module.modules() if isinstance(part, nn.Sequential)):
            parts = list(chain)
            for first, activation, second in zip(parts, parts[1:], parts[2:], strict=False):
                if (
                    isinstance(first, nn.Linear)
                    and isinstance(second, nn.Linear)
                    and isinstance(activation, activations)
                ):
                    found.append(HiddenLayer(first, activation, second))
    if not found:
        raise ValueError(
            "The search needs an `nn.Sequential` with `nn.Linear`, one of"
            f" {[activation.__name__ for activation in activations]} and `nn.Linear` in a row; there is none."
        )
    return found


def pieces(vector: Tensor, shared: Sequence[Parameter]) -> dict[int, Tensor]:
    """Views of a vector of shape (P,), each in the shape of its parameter, by the `id` of the parameter."""
    parts = vector.split([parameter.numel() for parameter in shared])
    return {id(parameter): part.view_as(parameter) for parameter, part in zip(shared, parts, strict=True)}


@contextmanager
def watched_inputs(modules: Sequence[nn.Module]) -> Iterator[dict[int, list[Tensor]]]:
    """The inputs of modules while they are called, by the `id` of the module."""
    seen: dict[int, list[Tensor]] = {id(module): [] for module in modules}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[id(module)].append(inputs[0].detach())

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def objective_gradient(context: SearchContext) -> tuple[float | None, Tensor]:
    """The value of the objective, and its gradient with the surface where the teleport starts."""
    return context.objective.value_and_gradient(context.surface, context.start)


def reach_of(context: SearchContext, value: float | None, slope: float, length: float, longest: float) -> float:
    """The factor of a step: as far as the objective needs to first order, but no farther than `longest`."""
    reach = longest
    if value is not None and slope > 0:
        reach = min(reach, (context.objective.aim(value) - value) / (slope / length))
    return reach / length if math.isfinite(reach) else longest / length


def norm_of(parameters: Sequence[Parameter]) -> float:
    """The Euclidean norm of parameters together."""
    return float(torch.stack([parameter.detach().norm() for parameter in parameters]).norm())
