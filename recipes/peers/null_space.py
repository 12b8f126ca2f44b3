"""Projection onto the null space of the inputs of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional
from typing_extensions import override

from lightning_cost import Search, SearchContext
from recipes.peers.layers import norm_of, objective_gradient, pieces, reach_of, watched_inputs

__all__ = ["NullSpaceSearch", "free_shares"]


class NullSpaceSearch(Search):
    r"""Moves each weight where the inputs of its layer do not see it.

    The inputs of a layer on the batch span a space. A change :math:`\Delta W` whose rows are orthogonal to it has
    :math:`\Delta W x = 0` for each of them. So the outputs stay, and with them the losses of any number of tasks,
    exactly and without a chord step. The direction is the gradient of the objective, projected onto these changes.
    (Wu et al., arXiv 2502.11362, 2025, who ascend the gradient norm. This is an implementation of the idea, not of
    their code.)

    It reaches the weights of `nn.Linear` and of `nn.Conv2d` without groups and with zero padding. Normalization between
    them sees the same inputs. A layer has a null space if its inputs on the batch, at all positions, do not span all
    of its input features: in wide linear layers with small batches.

    Args:
        cutoff: Singular values of the inputs below this share of the largest count as 0. Above rounding, what it lets
            through changes the losses.
        size: Longest step, relative to the norm of the weights that move.
        backtracks: How often a refused step is shortened, by 0.4.
    """

    def __init__(self, cutoff: float = 1e-5, size: float = 0.04, backtracks: int = 3) -> None:
        if not 0 < cutoff < 1:
            raise ValueError(f"cutoff={cutoff} must be between 0 and 1.")
        if not size > 0:
            raise ValueError(f"size={size} must be positive.")
        self.cutoff, self.size, self.backtracks = cutoff, size, backtracks

    @override
    def candidates(self, context: SearchContext) -> Iterator[None]:
        surface = context.surface
        surface.hold(context.origin)
        value, gradient = objective_gradient(context)
        layers = _layers(context.modules, surface.shared)
        with watched_inputs(layers) as inputs:
            surface.losses()
        step = torch.zeros_like(gradient)
        steps, gradients = pieces(step, surface.shared), pieces(gradient, surface.shared)
        for layer in layers:
            projector = _null_projector(_gramian_of_inputs(layer, inputs[id(layer)]), self.cutoff)
            along = gradients[id(layer.weight)].flatten(1).double() @ projector
            steps[id(layer.weight)].copy_(along.view_as(layer.weight))
        length = float(step.norm())
        if not length > 100 * torch.finfo(step.dtype).eps * float(gradient.norm()):
            return
        reach = reach_of(
            context, value, float(gradient @ step), length, self.size * norm_of([layer.weight for layer in layers])
        )
        for _ in range(1 + self.backtracks):
            surface.move_to(context.origin)
            surface.move_by(step, reach)
            yield
            reach *= 0.4

    @override
    def reach(self, modules: Mapping[str, nn.Module], shared: Sequence[Parameter]) -> Sequence[Parameter]:
        layers = _layers(modules, shared)
        if not layers:
            raise ValueError("NullSpaceSearch reaches no weight: no nn.Linear and no plain nn.Conv2d is shared.")
        return [layer.weight for layer in layers]

    def __repr__(self) -> str:
        return f"NullSpaceSearch(cutoff={self.cutoff}, size={self.size}, backtracks={self.backtracks})"


def free_shares(context: SearchContext, cutoff: float = 1e-5) -> dict[str, float]:
    """By the name of each layer, the share of its weights that the null space of its inputs leaves free."""
    layers = _layers(context.modules, context.surface.shared)
    names = {
        id(layer): f"{prefix}.{name}" if name else prefix
        for prefix, module in context.modules.items()
        for name, layer in module.named_modules()
    }
    with watched_inputs(layers) as inputs:
        context.surface.losses()
    shares = {}
    for layer in layers:
        projector = _null_projector(_gramian_of_inputs(layer, inputs[id(layer)]), cutoff)
        shares[names[id(layer)]] = float(projector.trace()) / len(projector)
    return shares


def _layers(modules: Mapping[str, nn.Module], shared: Sequence[Parameter]) -> list[nn.Linear | nn.Conv2d]:
    chosen = {id(parameter) for parameter in shared}
    found: dict[int, nn.Linear | nn.Conv2d] = {}
    for part in (part for module in modules.values() for part in module.modules()):
        plain = isinstance(part, nn.Linear) or (
            isinstance(part, nn.Conv2d) and part.groups == 1 and part.padding_mode == "zeros"
        )
        if plain and id(part.weight) in chosen:
            found[id(part.weight)] = part  # type: ignore[assignment]
    return list(found.values())


def _gramian_of_inputs(layer: nn.Linear | nn.Conv2d, inputs: Sequence[Tensor]) -> Tensor:
    """The inner products of the input features, over all samples and positions."""
    size = layer.weight[0].numel()
    gramian = torch.zeros(size, size, dtype=torch.double, device=layer.weight.device)
    for each in inputs:
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            patches = functional.unfold(each, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            rows = patches.transpose(1, 2).reshape(-1, size).double()
        else:
            rows = each.reshape(-1, size).double()
        gramian.addmm_(rows.T, rows)
    return gramian


def _null_projector(gramian: Tensor, cutoff: float) -> Tensor:
    values, vectors = torch.linalg.eigh(gramian)
    null = vectors[:, values <= cutoff**2 * values[-1].clamp_min(0)]
    return null @ null.T
