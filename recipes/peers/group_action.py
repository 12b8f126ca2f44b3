"""Symmetry teleportation by a group action on hidden layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import override

from lightning_cost import Search, SearchContext
from recipes.peers.layers import HiddenLayer, hidden_layers, objective_gradient, pieces, watched_inputs

__all__ = ["GroupActionSearch"]

_BIJECTIVE = (nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.Identity)


class GroupActionSearch(Search):
    r"""Transforms the units of a hidden layer by a matrix near the identity, and undoes it in the next layer.

    With :math:`Z` the values of the units before the activation :math:`\sigma` on the batch, one row a sample, and
    :math:`g = I + \epsilon T`, the first layer becomes :math:`g W_1`, and the second :math:`W_2 + \Delta W_2` with

    .. math:: \Delta W_2^T = \sigma(Z g^T)^+ (\sigma(Z) - \sigma(Z g^T)) W_2^T,

    the smallest change that keeps the outputs on the batch. It keeps them where :math:`\sigma(Z g^T)` has independent
    rows, so there must be at least as many units as samples. :math:`T` is the gradient of the objective.

    After Zhao et al., *Symmetry teleportation for accelerated optimization*, NeurIPS 2022, who ascend the norm of the
    gradient. Their second layer is :math:`\sigma(Z g^T)^+ \sigma(Z) W_2^T`, which for more units than samples differs
    from :math:`W_2^T` also at :math:`g = I`. This is an implementation of the idea, not of their code.

    Args:
        size: Longest step, relative to the norm of the weights that move.
        backtracks: How often a refused step is shortened, by 0.4.
    """

    uses_aim = False

    def __init__(self, size: float = 0.04, backtracks: int = 3) -> None:
        if not size > 0:
            raise ValueError(f"size={size} must be positive.")
        self.size, self.backtracks = size, backtracks

    @override
    def candidates(self, context: SearchContext) -> Iterator[None]:
        surface, layers = context.surface, hidden_layers(context.modules, _BIJECTIVE)
        surface.hold(context.origin)
        gradients = pieces(objective_gradient(context)[1], surface.shared)
        with watched_inputs([layer.activation for layer in layers]) as inputs:
            surface.losses()
        before = [torch.cat(inputs[id(layer.activation)]).double() for layer in layers]
        directions = [_direction(layer, z, gradients) for layer, z in zip(layers, before, strict=True)]
        length = torch.stack([direction.norm() for direction in directions]).norm()
        if not bool(length > 0) or not bool(length.isfinite()):
            return
        # A matrix near the identity changes a weight by about the share that it differs from the identity by.
        reach = self.size * len(layers) ** 0.5 * max(len(direction) for direction in directions) ** 0.5 / float(length)
        for _ in range(1 + self.backtracks):
            surface.move_to(context.origin)
            for layer, z, direction in zip(layers, before, directions, strict=True):
                _act(layer, z, torch.eye(len(direction), dtype=z.dtype) + reach * direction)
            yield
            reach *= 0.4

    @override
    def reach(self, modules: Mapping[str, nn.Module], shared: Sequence[Parameter]) -> Sequence[Parameter]:
        layers = hidden_layers(modules, _BIJECTIVE)
        return list({id(w): w for layer in layers for w in (layer.first.weight, layer.second.weight)}.values())

    def __repr__(self) -> str:
        return f"GroupActionSearch(size={self.size}, backtracks={self.backtracks})"


def _transformed(layer: HiddenLayer, z: Tensor, g: Tensor) -> list[Tensor]:
    """The weight and bias of the first layer, and the weight of the second, after the action of `g`."""
    first, second = layer.first, layer.second
    moved = [g @ first.weight.detach().to(g)]
    if first.bias is not None:
        moved.append(g @ first.bias.detach().to(g))
    fresh, weight = layer.activation(z @ g.T), second.weight.detach().to(g)
    return [*moved, weight + (torch.linalg.pinv(fresh) @ (layer.activation(z) - fresh) @ weight.T).T]


def _parameters(layer: HiddenLayer) -> list[Parameter]:
    bias = [] if layer.first.bias is None else [layer.first.bias]
    return [layer.first.weight, *bias, layer.second.weight]


def _direction(layer: HiddenLayer, z: Tensor, gradients: Mapping[int, Tensor]) -> Tensor:
    """The derivative of the objective by the matrix, at the identity."""
    identity = torch.eye(layer.first.out_features, dtype=z.dtype, requires_grad=True)
    with torch.enable_grad():
        moved = _transformed(layer, z, identity)
        along = [gradients[id(parameter)].to(z) for parameter in _parameters(layer)]
        direction: Tensor = torch.autograd.grad(moved, identity, grad_outputs=along)[0]
    return direction


@torch.no_grad()
def _act(layer: HiddenLayer, z: Tensor, g: Tensor) -> None:
    for parameter, value in zip(_parameters(layer), _transformed(layer, z, g), strict=True):
        parameter.copy_(value)
