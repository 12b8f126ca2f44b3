"""Neural teleportation: rescale hidden units, and undo it in the next layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import override

from lightning_cost import Search, SearchContext
from recipes.peers.layers import objective_gradient, pieces

__all__ = ["RescalingSearch", "ScaledUnits", "scaled_units"]

_BETWEEN = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.Dropout, nn.Flatten)


@dataclass(frozen=True)
class ScaledUnits:
    """Two layers of an `nn.Sequential`, and between them only what commutes with positive factors of the units."""

    first: nn.Linear | nn.Conv2d
    second: nn.Linear | nn.Conv2d

    @property
    def count(self) -> int:
        """The number of units: outputs of the first layer, or channels."""
        return len(self.first.weight)

    def by_unit(self, weight: Tensor) -> Tensor:
        """The weight of the second layer as (outputs, units, inputs of a unit). Flattened channels have many."""
        return weight.reshape(len(weight), self.count, -1)


def scaled_units(modules: Mapping[str, nn.Module]) -> list[ScaledUnits]:
    """The pairs of layers whose hidden units can be rescaled, in the order of the network.

    Raises:
        ValueError: If there is none.
    """
    found = []
    chains = [part for module in modules.values() for part in module.modules() if isinstance(part, nn.Sequential)]
    for chain in chains:
        first: nn.Linear | nn.Conv2d | None = None
        for part in chain:
            plain = isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1)
            if plain and first is not None and part.weight[0].numel() % len(first.weight) == 0:
                found.append(ScaledUnits(first, part))  # type: ignore[arg-type]
            if plain or not isinstance(part, _BETWEEN):
                first = part if plain else None  # type: ignore[assignment]
    if not found:
        raise ValueError(
            "RescalingSearch needs an `nn.Sequential` with two of nn.Linear or nn.Conv2d, and between them only"
            f" {', '.join(kind.__name__ for kind in _BETWEEN)}; there is none."
        )
    return found


class RescalingSearch(Search):
    r"""Multiplies each hidden unit by a positive number, and divides it out again in the next layer.

    With a positively homogeneous activation (ReLU, LeakyReLU), :math:`\sigma(\tau z) = \tau \sigma(z)` for
    :math:`\tau > 0`, so the network computes the same for *every* input, not on the batch only. (Armenta et al.,
    *Neural teleportation*, Mathematics 2023, who draw :math:`\tau` at random.) A channel of a convolution is a unit.
    Pooling and flattening between two layers do not matter.

    Args:
        direction: `"random"`: draw the logarithms of :math:`\tau` from a normal distribution. `"gradient"`: take them
            along the gradient of the objective.
        spread: Standard deviation of the logarithms at random, and their largest size along the gradient.
        tries: Number of draws. Along the gradient, the step is halved after each.
    """

    uses_aim = False

    def __init__(
        self, direction: Literal["random", "gradient"] = "random", spread: float = 0.3, tries: int = 4
    ) -> None:
        if direction not in ("random", "gradient"):
            raise ValueError(f"direction={direction!r} must be 'random' or 'gradient'.")
        if not spread > 0:
            raise ValueError(f"spread={spread} must be positive.")
        if tries < 1:
            raise ValueError(f"tries={tries} must be at least 1.")
        self.direction, self.spread, self.tries = direction, spread, tries

    @override
    def candidates(self, context: SearchContext) -> Iterator[None]:
        surface, units = context.surface, scaled_units(context.modules)
        surface.hold(context.origin)
        slopes: list[Tensor] | None = None
        if self.direction == "gradient":
            gradients = pieces(objective_gradient(context)[1], surface.shared)
            slopes = [_slope(each, gradients) for each in units]
            typical = torch.cat(slopes).square().mean().sqrt()
            if not bool(typical > 0):
                return
            # A few units have most of the gradient. Without bounds their scales run away within a dozen teleports.
            slopes = [(slope / typical).clamp(-1, 1) for slope in slopes]
        for attempt in range(self.tries):
            surface.move_to(context.origin)
            for index, each in enumerate(units):
                if slopes is None:
                    logarithms = self.spread * torch.randn(each.count, generator=surface.generator)
                else:
                    logarithms = self.spread / 2**attempt * slopes[index]
                _rescale(each, logarithms.to(each.first.weight).exp())
            yield

    @override
    def reach(self, modules: Mapping[str, nn.Module], shared: Sequence[Parameter]) -> Sequence[Parameter]:
        units = scaled_units(modules)
        return list({id(w): w for each in units for w in (each.first.weight, each.second.weight)}.values())

    def __repr__(self) -> str:
        return f"RescalingSearch(direction={self.direction!r}, spread={self.spread}, tries={self.tries})"


@torch.no_grad()
def _rescale(units: ScaledUnits, scales: Tensor) -> None:
    first, second = units.first, units.second
    first.weight.copy_(first.weight * scales.view(-1, *[1] * (first.weight.ndim - 1)))
    if first.bias is not None:
        first.bias.copy_(first.bias * scales)
    second.weight.copy_((units.by_unit(second.weight) / scales[:, None]).view_as(second.weight))


def _slope(units: ScaledUnits, gradients: Mapping[int, Tensor]) -> Tensor:
    """The derivative of the objective by the logarithm of each unit's scale."""
    first, second = units.first, units.second
    slope = (gradients[id(first.weight)] * first.weight.detach()).flatten(1).sum(dim=1)
    if first.bias is not None:
        slope = slope + gradients[id(first.bias)] * first.bias.detach()
    return slope - units.by_unit(gradients[id(second.weight)] * second.weight.detach()).sum(dim=(0, 2))
