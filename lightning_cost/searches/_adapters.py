"""Low-rank changes of the shared weights: by PEFT adapters, or aligned with a direction."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches

import torch
from peft import PeftConfig, PeftType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_cost._vectors import views

__all__: list[str] = []

_ADAPTER = "teleport"
# PEFT reaches more layers, but only for these the change has the shape of the weight.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class PeftAdapter:
    """The weight change that merging a PEFT adapter would make, as a differentiable function of its parameters.

    PEFT wraps the layers in a container of its own, which shares them with the model. The model itself is never
    changed: there is nothing to unwrap, compiled graphs stay valid, and modules that use a weight without calling its
    layer (attention does) see the change like any other.

    Args:
        modules: The shared modules.
        shared: The shared parameters, which decide the order of the :math:`P` elements.
        config: A LoRA, LoHa or LoKr configuration. Its ``target_modules``, if set, choose among the layers that can be
            reached; otherwise all of them are taken.
        generator: Seeds the initial adapter parameters, on the CPU.

    Raises:
        ValueError: If no layer can be reached.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        shared: Sequence[Parameter],
        config: PeftConfig,
        generator: torch.Generator,
    ) -> None:
        layers = reachable_layers(modules, shared, config)
        if not layers:
            raise ValueError(unreachable_message(modules, shared, config))
        self._shared = list(shared)
        holder = nn.Module()
        for index, layer in enumerate(layers):
            holder.add_module(f"layer{index}", layer)
        base = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
        with torch.random.fork_rng(devices=[]):
            # `torch.manual_seed` would seed the other devices as well.
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            try:
                inject_adapter_in_model(_targeting(config, len(layers)), holder, adapter_name=_ADAPTER)
            finally:
                for parameter, requires_grad in base:
                    parameter.requires_grad_(requires_grad)
        self._layers: list[tuple[Parameter, BaseTunerLayer]] = []
        for index, layer in enumerate(layers):
            tuner = holder.get_submodule(f"layer{index}")
            weight = layer.weight
            assert isinstance(tuner, BaseTunerLayer)
            assert isinstance(weight, Parameter)
            self._layers.append((weight, tuner))
        known = {id(parameter) for parameter, _ in base}
        self.parameters = [parameter for parameter in holder.parameters() if id(parameter) not in known]

    def change(self) -> Tensor:
        """The change of the shared parameters, shape ``(P,)``, differentiable in :attr:`parameters`."""
        changes = {
            id(weight): tuner.get_delta_weight(_ADAPTER)  # type: ignore[attr-defined]
            for weight, tuner in self._layers
        }
        pieces = [changes.get(id(p), torch.zeros_like(p)).reshape(-1) for p in self._shared]
        return torch.cat(pieces)


def low_rank(direction: Tensor, shared: Sequence[Parameter], targets: Sequence[Parameter], rank: int) -> Tensor:
    """The part of a direction that a LoRA of this rank can follow: its best approximation, weight by weight.

    This is a LoRA whose factors are aligned with the direction instead of random. For each weight, they are the
    truncated singular value decomposition of its slice of the direction, as a matrix of output by input features.

    Args:
        direction: Vector of shape ``(P,)``.
        shared: The shared parameters that its elements belong to.
        targets: The weights that may change; the others get zeros.
        rank: Largest rank of the change of a weight.

    Returns:
        Vector of shape ``(P,)``.
    """
    chosen = {id(parameter) for parameter in targets}
    result = torch.zeros_like(direction)
    for parameter, piece, out in zip(shared, views(direction, shared), views(result, shared), strict=True):
        if id(parameter) in chosen:
            shape = (parameter.shape[0], -1)
            _truncate(piece.reshape(shape), rank, out=out.view(shape))
    return result


# If the smaller side of a matrix is at most this long, decomposing it whole is faster than a truncated decomposition.
_SMALL_SIDE = 24


def _truncate(matrix: Tensor, rank: int, out: Tensor) -> None:
    side = min(matrix.shape)
    if side <= rank:
        out.copy_(matrix)
        return
    if side > _SMALL_SIDE:
        basis = _range(matrix, min(rank + 2, side))
        left = basis.T @ _left_singular_vectors(basis @ matrix, rank)
        torch.mm(left, left.T @ matrix, out=out)
    elif matrix.shape[0] <= matrix.shape[1]:
        left = _left_singular_vectors(matrix, rank)
        torch.mm(left, left.T @ matrix, out=out)
    else:
        right = _left_singular_vectors(matrix.T, rank)
        torch.mm(matrix @ right, right.T, out=out)


def _left_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Those of the largest singular values of a wide matrix. This takes a third of the time of a full decomposition."""
    wide = matrix.double()
    vectors: Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors
    return vectors[:, -rank:].to(matrix)


def _range(matrix: Tensor, size: int, iterations: int = 2) -> Tensor:
    """An orthonormal basis that approximates the range of a matrix: randomized subspace iteration.

    It is Algorithm 4.4 of Halko, Martinsson and Tropp (2011). ``torch.svd_lowrank`` does the same, but draws from the
    global generators, which may differ between processes.

    Returns:
        The basis vectors as rows. Products with rows take a quarter of the time of products with columns.
    """
    test = torch.randn(size, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    basis = _orthonormal(test @ matrix.T)
    for _ in range(iterations):
        basis = _orthonormal(_orthonormal(basis @ matrix) @ matrix.T)
    return basis


def _orthonormal(rows: Tensor) -> Tensor:
    columns: Tensor = torch.linalg.qr(rows.T).Q
    return columns.T


def matrix_parameters(
    modules: Mapping[str, nn.Module], shared: Sequence[Parameter], is_target: Callable[[str, nn.Module], bool]
) -> list[Parameter]:
    """The shared weights that an aligned LoRA can change: matrices, and tensors seen as matrices.

    PEFT knows certain layers only. This reaches any weight with two or more dimensions, recurrent ones included.

    Args:
        modules: The shared modules by name.
        shared: The shared parameters.
        is_target: Chooses among the modules that own weights, by their dotted name.
    """
    wanted = {id(parameter) for parameter in shared if parameter.ndim >= 2}
    found: dict[Parameter, None] = {}
    for name, module in _named_submodules(modules):
        if is_target(name, module):
            found.update(dict.fromkeys(p for p in module.parameters(recurse=False) if id(p) in wanted))
    return list(found)


def reachable_layers(
    modules: Mapping[str, nn.Module], shared: Sequence[Parameter], config: PeftConfig
) -> list[nn.Module]:
    """The layers of the shared modules that a PEFT adapter can change, each weight once."""
    layers = _filtered(modules, shared, config)[-1]
    return list({id(layer.weight): layer for _, layer in reversed(layers)}.values())[::-1]


def _filtered(
    modules: Mapping[str, nn.Module], shared: Sequence[Parameter], config: PeftConfig
) -> list[list[tuple[str, nn.Module]]]:
    """The layers with their names after each condition: kind, own weight, trained, supported by the adapter, target."""
    wanted = {id(parameter) for parameter in shared}
    conditions: list[Callable[[str, nn.Module], bool]] = [
        lambda name, layer: isinstance(layer, _LAYERS),
        # A parametrized layer computes its weight: it has no parameter of that name.
        lambda name, layer: "weight" in dict(layer.named_parameters(recurse=False)),
        lambda name, layer: id(layer.weight) in wanted,
        lambda name, layer: _fits(layer, config),
        lambda name, layer: is_target(config, name, layer),
    ]
    found = [list(_named_submodules(modules))]
    for condition in conditions:
        found.append([(name, layer) for name, layer in found[-1] if condition(name, layer)])
    return found[1:]


def left_out(
    modules: Mapping[str, nn.Module],
    shared: Sequence[Parameter],
    is_target: Callable[[str, nn.Module], bool],
    reached: Sequence[Parameter],
) -> list[str]:
    """The targeted modules, with their classes, that own shared matrices which are not reached."""
    missing = {id(parameter) for parameter in shared if parameter.ndim >= 2} - {id(parameter) for parameter in reached}
    names = {}
    for name, module in _named_submodules(modules):
        owned = {id(parameter) for parameter in module.parameters(recurse=False)}
        if owned & missing and is_target(name, module):
            names[name] = f"{name} ({type(module).__name__})"
    return list(names.values())


def changed_fields(config: PeftConfig) -> str:
    """A configuration, without the dozens of fields that have their default."""
    default = type(config)().to_dict()
    changed = {
        # The order of a set differs between processes.
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if value != default.get(name)
    }
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def unreachable_message(modules: Mapping[str, nn.Module], shared: Sequence[Parameter], config: PeftConfig) -> str:
    """The error for an adapter that reaches no shared weight: which condition leaves no layer."""
    of_kind, own, trained, fitting, _ = _filtered(modules, shared, config)
    kind, targets = type(config).__name__, getattr(config, "target_modules", None)
    excluded = getattr(config, "exclude_modules", None)
    layers = ", ".join(name for name, _ in fitting[:8])
    if not of_kind:
        reason = (
            "the shared modules have no Linear, Conv1d, Conv2d, Conv3d or Embedding layer. Use LevelSetSearch, which"
            " reaches any weight with two or more dimensions"
        )
    elif not own:
        reason = (
            "all layers are parametrized, so that they compute their weights. Use LevelSetSearch, which reaches them"
        )
    elif not trained:
        reason = f"the weights are not trained ({', '.join(name for name, _ in own[:8])}). Unfreeze some of them"
    elif not fitting:
        reason = (
            f"PEFT supports none of the layers with it ({', '.join(name for name, _ in trained[:8])}). LoRA takes no"
            " grouped convolutions; LoHa and LoKr take no Embedding and no Conv3d. Choose another kind of adapter, or"
            " LevelSetSearch"
        )
    elif excluded and targets is None:
        reason = f"`exclude_modules={excluded!r}` leaves out all layers ({layers}). Exclude fewer"
    elif getattr(config, "layers_to_transform", None) is not None:
        chosen = f"`layers_to_transform={config.layers_to_transform!r}`"  # type: ignore[attr-defined]
        reason = f"{chosen} with `target_modules={targets!r}` chooses none of the layers {layers}. Name one of them"
    else:
        reason = (
            f"`target_modules={targets!r}` chooses none of the layers {layers}. Name one of them, or leave it unset"
        )
    return f"`adapter` ({kind}) reaches no weight of the shared modules: {reason}."


def check_targets_exist(modules: Mapping[str, nn.Module], targets: object, argument: str = "target_modules") -> None:
    """Refuse a list with a name that no module with weights has. An expression may match anything.

    Args:
        modules: The shared modules by name.
        targets: The list.
        argument: Its name.

    Raises:
        ValueError: If there is one.
    """
    if targets is None or isinstance(targets, str):
        return
    # A container is no target itself: its layers have names of their own.
    names = [name for name, module in _named_submodules(modules) if any(True for _ in module.parameters(recurse=False))]
    assert isinstance(targets, Iterable)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = get_close_matches(target, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" They are: {', '.join(names[:8])}."
            raise ValueError(
                f"`{argument}` names {target!r}, but no shared module has this name and weights of its own.{hint}"
            )


def _named_submodules(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for prefix, root in modules.items():
        for name, module in root.named_modules():
            # `torch.compile` wraps modules. The wrapper is not part of the name that the user gave.
            yield ".".join([prefix, *(part for part in name.split(".") if part not in ("", "_orig_mod"))]), module


def is_target(config: PeftConfig, name: str, module: nn.Module) -> bool:
    """Whether a configuration targets a module, by its dotted name."""
    targets = getattr(config, "target_modules", None)
    if targets == "all-linear" and not isinstance(module, nn.Linear):
        return False
    if targets in (None, "all-linear"):
        if not getattr(config, "exclude_modules", None):
            return True
        config = copy.copy(config)
        config.target_modules = ".*"  # type: ignore[attr-defined]
    return bool(check_target_module_exists(config, name))


def _fits(module: nn.Module, config: PeftConfig) -> bool:
    grouped = getattr(module, "groups", 1) != 1
    embedding_or_volume = isinstance(module, (nn.Embedding, nn.Conv3d))
    if config.peft_type == PeftType.LORA:
        return not grouped
    return not embedding_or_volume


def _targeting(config: PeftConfig, num_layers: int) -> PeftConfig:
    """The same configuration for the layers of the container, which are chosen already."""
    config = copy.copy(config)
    config.inference_mode = False
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, name):
            setattr(config, name, None)
    config.target_modules = {f"layer{index}" for index in range(num_layers)}  # type: ignore[attr-defined]
    return config
