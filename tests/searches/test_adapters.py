"""Which weights an adapter reaches, and the best low rank."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    inject_adapter_in_model,
)
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_cost.searches._adapters import (
    PeftAdapter,
    is_target,
    low_rank,
    matrix_parameters,
    reachable_layers,
)
from tests.support.adapters import REACH, adapt, generator, randn, randomize, shared_of


@pytest.mark.parametrize("name", list(REACH))
def test_what_adapters_reach(name: str) -> None:
    make, shapes, lora, others = REACH[name]
    module = make()
    modules, shared = {"backbone": module}, shared_of(module)
    found = matrix_parameters(modules, shared, partial(is_target, LoraConfig(r=2)))
    assert [tuple(parameter.shape) for parameter in found] == shapes
    assert all(any(parameter is candidate for candidate in shared) for parameter in found)
    for config, count in ((LoraConfig(r=2), lora), (LoHaConfig(r=2), others), (LoKrConfig(r=2), others)):
        layers = reachable_layers(modules, shared, config)
        assert len(layers) == count
        if not count:
            with pytest.raises(ValueError, match=f"`adapter` \\({type(config).__name__}.* reaches no weight"):
                adapt(module, config)


def test_a_weight_that_two_layers_share_is_reached_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(4, 4))
    module[1].weight = module[0].weight
    module[2].weight = module[0].weight
    modules, shared = {"backbone": module}, shared_of(module)
    assert matrix_parameters(modules, shared, partial(is_target, LoraConfig(r=2))) == [module[0].weight]
    assert reachable_layers(modules, shared, LoraConfig(r=2)) == [module[0]]
    adapter = adapt(module, LoraConfig(r=2))
    assert len(adapter.parameters) == 2
    randomize(adapter)
    left, right = adapter.parameters
    assert_close(adapter.change()[:16].view(4, 4).double(), (8 / 2) * (right @ left).double(), rtol=1e-5, atol=1e-6)


def test_only_shared_weights_are_reached() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    modules, shared = {"backbone": module}, [module[1].weight]
    assert matrix_parameters(modules, shared, partial(is_target, LoraConfig(r=2))) == shared
    assert reachable_layers(modules, shared, LoraConfig(r=2)) == [module[1]]
    adapter = PeftAdapter(modules, shared, LoraConfig(r=2), generator())
    assert adapter.change().shape == (6,)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(2))
        self.memory = nn.GRU(4, 4)


@pytest.mark.parametrize(
    ("settings", "peft", "aligned"),
    [
        ({}, 5, 7),
        ({"target_modules": None}, 5, 7),
        ({"target_modules": ["down"]}, 2, 2),
        ({"target_modules": ["blocks.1.down", "stem"]}, 2, 2),
        ({"target_modules": ["own", "locks"]}, 0, 0),
        ({"target_modules": r".*blocks\.0\..*"}, 2, 2),
        ({"target_modules": r"blocks\.0\..*"}, 0, 0),
        ({"target_modules": ["memory"]}, 0, 2),
        ({"target_modules": "all-linear"}, 4, 4),
        ({"target_modules": []}, 0, 0),
        ({"target_modules": ["up", "down"], "layers_to_transform": [1]}, 2, 2),
        ({"target_modules": ["up", "down"], "exclude_modules": ["blocks.0.up"]}, 3, 3),
        ({"exclude_modules": ["up"]}, 3, 5),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.up"}, 2, 2),
    ],
)
def test_target_modules_choose_among_the_layers(settings: dict[str, Any], peft: int, aligned: int) -> None:
    net, config = Net(), LoraConfig(r=2, **settings)
    modules, shared = {"backbone": net}, shared_of(net)
    assert len(reachable_layers(modules, shared, config)) == peft
    assert len(matrix_parameters(modules, shared, partial(is_target, config))) == aligned
    if peft:
        before = config.to_dict()
        assert len(adapt(net, config).parameters) == 2 * peft
        assert config.to_dict() == before


def test_a_shared_module_may_be_a_layer_itself() -> None:
    layer = nn.Linear(6, 8)
    for targets in (None, ["backbone"], "backbone", "all-linear"):
        config = LoraConfig(r=2, target_modules=targets)
        assert reachable_layers({"backbone": layer}, shared_of(layer), config) == [layer]
        assert matrix_parameters({"backbone": layer}, shared_of(layer), partial(is_target, config)) == [layer.weight]
    assert adapt(layer, LoraConfig(r=2)).change().shape == (8 * 6 + 8,)


def test_several_shared_modules_are_told_apart_by_name() -> None:
    first, second = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(4, 5))
    modules = {"encoder": first, "decoder": second}
    shared = [*shared_of(first), *shared_of(second)]
    config = LoraConfig(r=2, target_modules=["decoder.0"])
    assert reachable_layers(modules, shared, config) == [second[0]]
    change = PeftAdapter(modules, shared, config, generator())
    randomize(change)
    assert not change.change()[:16].any()
    assert change.change()[16:36].all()
    assert not change.change()[36:].any()


def best_approximation(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return sum(values[i] * torch.outer(left[:, i], right[i]) for i in range(rank))  # type: ignore[return-value]


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
def test_low_rank_is_the_best_approximation_of_every_weight(rank: int) -> None:
    module = nn.Sequential(nn.Linear(9, 7), nn.Conv2d(3, 6, 3), nn.LayerNorm(4), nn.Embedding(5, 8)).double()
    shared = shared_of(module)
    targets = [module[0].weight, module[1].weight, module[3].weight]
    direction = randn(sum(p.numel() for p in shared))
    pieces = low_rank(direction, shared, targets, rank).split([p.numel() for p in shared])
    for parameter, piece, whole in zip(shared, pieces, direction.split([p.numel() for p in shared]), strict=True):
        if not any(parameter is target for target in targets):
            assert not piece.any()
            continue
        matrix = whole.view(len(parameter), -1)
        expected = best_approximation(matrix, min(rank, *matrix.shape))
        assert_close(piece.view_as(matrix), expected, rtol=1e-10, atol=1e-12)
        assert torch.linalg.matrix_rank(piece.view_as(matrix), rtol=1e-10) == min(rank, *matrix.shape)


def with_spectrum(rows: int, columns: int, values: Tensor) -> Tensor:
    left = torch.linalg.qr(randn(rows, len(values), seed=1))[0]
    right = torch.linalg.qr(randn(columns, len(values), seed=2))[0]
    return left @ values.diag() @ right.T


@pytest.mark.parametrize("shape", [(100, 130), (130, 100)])
def test_low_rank_of_large_matrices_is_nearly_the_best(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False).double()

    whole = torch.linalg.svd

    def of_small(decomposed: Tensor, **kwargs: Any) -> Any:
        assert min(decomposed.shape) < 20, "decomposed as a whole"
        return whole(decomposed, **kwargs)

    for values, slack in ((0.5 ** torch.arange(20.0), 1 + 1e-6), (1 / torch.arange(1.0, 101.0), 1.05)):
        matrix = with_spectrum(*shape, values.double())
        best = (matrix - best_approximation(matrix, 5)).norm()
        with monkeypatch.context() as patched:
            patched.setattr(torch.linalg, "svd", of_small)
            found = low_rank(matrix.reshape(-1), [layer.weight], [layer.weight], 5).view(shape)
        assert torch.linalg.matrix_rank(found, rtol=1e-10) == 5
        assert best * (1 - 1e-9) <= (matrix - found).norm() <= best * slack


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_is_a_peft_lora_with_those_factors(kind: str, rank: int) -> None:
    layer = {"linear": lambda: nn.Linear(9, 7), "conv2d": lambda: nn.Conv2d(3, 6, 3)}[kind]().double()
    direction = randn(sum(p.numel() for p in layer.parameters()))
    moved = low_rank(direction, shared_of(layer), [layer.weight], rank)

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    wrapped = inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(layer)))
    size = layer.weight.numel()
    left, values, right = torch.linalg.svd(direction[:size].view(len(layer.weight), -1), full_matrices=False)
    a, b = wrapped[0].lora_A["default"].weight, wrapped[0].lora_B["default"].weight
    with torch.no_grad():
        a.copy_((values[:rank].sqrt()[:, None] * right[:rank]).view(a.shape))
        b.copy_((left[:, :rank] * values[:rank].sqrt()).view(b.shape))
    wrapped[0].merge()
    expected = wrapped[0].base_layer.weight - layer.weight
    assert_close(moved[:size].view_as(expected), expected.detach(), rtol=1e-10, atol=1e-12)
    assert not moved[size:].any()


def test_low_rank_of_nothing_is_nothing() -> None:
    layer = nn.Linear(9, 7).double()
    zero = torch.zeros(70, dtype=torch.float64)
    assert not low_rank(zero, shared_of(layer), [layer.weight], 2).any()
    assert not low_rank(zero + 1, shared_of(layer), [], 2).any()


def test_low_rank_keeps_the_angle_to_the_direction() -> None:
    # The part that is kept is orthogonal to the one that is not.
    layer = nn.Linear(20, 30, bias=False).double()
    direction = randn(600)
    kept = low_rank(direction, [layer.weight], [layer.weight], 4)
    assert_close(kept @ direction, kept @ kept)
    assert math.isclose(float(kept.norm() ** 2 + (direction - kept).norm() ** 2), float(direction.norm() ** 2))
