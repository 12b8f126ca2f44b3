"""Layers that adapters reach or do not reach, and adapters of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.parametrizations import weight_norm

from lightning_cost.searches._adapters import PeftAdapter


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(6, 8))  # type: ignore[no-any-return]


class Frozen(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Linear(8, 4))
        self[0].requires_grad_(False)


def shared_of(module: nn.Module) -> list[Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def adapt(module: nn.Module, config: PeftConfig, seed: int = 0) -> PeftAdapter:
    return PeftAdapter({"backbone": module}, shared_of(module), config, generator(seed))


def randomize(adapter: PeftAdapter) -> None:
    """Let every factor differ from zero."""
    with torch.no_grad():
        for seed, parameter in enumerate(adapter.parameters):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=seed))


# The shapes of the weights that an aligned LoRA reaches, and how many layers PEFT's LoRA and LoHa or LoKr reach.
REACH: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], int, int]] = {
    "linear": (lambda: nn.Linear(6, 8), [(8, 6)], 1, 1),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), [(8, 6)], 1, 1),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), [(6, 4, 3)], 1, 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), [(6, 4, 3, 3)], 1, 1),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), [(6, 4, 3, 3, 3)], 1, 0),
    "embedding": (lambda: nn.Embedding(10, 6), [(10, 6)], 1, 0),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), [(6, 2, 3, 3)], 0, 1),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3), [(4, 6, 3, 3)], 0, 0),
    "gru": (lambda: nn.GRU(4, 6), [(18, 4), (18, 6)], 0, 0),
    "attention": (lambda: nn.MultiheadAttention(8, 2), [(24, 8), (8, 8)], 1, 1),
    "weight norm": (lambda: weight_norm(nn.Linear(6, 8)), [(8, 1), (8, 6)], 0, 0),
    "old weight norm": (old_weight_norm, [(8, 1), (8, 6)], 0, 0),
    "batch norm": (lambda: nn.BatchNorm2d(4), [], 0, 0),
    "frozen": (Frozen, [(4, 8)], 1, 1),
    "nested": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 2))), [(3, 4), (2, 3)], 2, 2),
}
