"""Which modules and parameters of a LightningModule the tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import reduce
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

__all__: list[str] = []


def check_task_losses(module: LightningModule, mixin: type) -> None:
    """Refuse a module in which nobody but the mixin has written ``task_losses``.

    Raises:
        MisconfigurationException: If nobody has, or if it cannot be called.
    """
    places = [vars(module), *(vars(base) for base in type(module).__mro__ if base is not mixin)]
    found = next((place["task_losses"] for place in places if "task_losses" in place), None)
    if not callable(getattr(found, "__func__", getattr(found, "fget", found))):
        raise MisconfigurationException(missing_task_losses(module))


def missing_task_losses(module: LightningModule) -> str:
    """The error for a module without ``task_losses``."""
    return f"{type(module).__name__} must implement `task_losses(self, batch, batch_idx)`: a scalar loss for each task."


def check_names(module: LightningModule, names: Sequence[str]) -> None:
    """Refuse submodules, parameters and buffers with names of the mixin, which would hide them.

    Raises:
        MisconfigurationException: If there is one.
    """
    for name in names:
        if any(name in registered for registered in (module._modules, module._parameters, module._buffers)):
            raise MisconfigurationException(
                f"{type(module).__name__} registers a submodule, parameter or buffer as `{name}`, a name that"
                " MultiTaskMixin uses. Give it another name."
            )


def shared_modules(module: LightningModule) -> dict[str, nn.Module]:
    """The modules that the attribute ``shared_module`` names, by their paths.

    Raises:
        MisconfigurationException: If there is no such module.
    """
    # A submodule of this name is hidden behind the class attribute.
    names: Any = module._modules.get("shared_module", module.shared_module)
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise MisconfigurationException(
            f"`shared_module` of {type(module).__name__} must be the name of the attribute that holds the shared"
            f" module, such as 'backbone', or a list of names; got {names!r}."
        )
    return {name: _find(module, name) for name in names}


def shared_parameters(module: LightningModule) -> list[Parameter]:
    """The parameters of the shared modules that require a gradient, each once. All may be frozen for now.

    Raises:
        MisconfigurationException: If the shared modules have no parameters.
    """
    return [parameter for parameter in _all_parameters(module) if parameter.requires_grad]


def check_parameters(module: LightningModule) -> None:
    """Refuse parameters that task gradients cannot be computed for.

    Raises:
        MisconfigurationException: If a parameter or buffer has no shape yet, or if a shared parameter is complex.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise MisconfigurationException(
                f"`{name}` of {type(module).__name__} belongs to a lazy module and has no shape yet. Run a dummy batch"
                " through the network first, for example in `__init__` or `configure_model`."
            )
    for parameter in shared_parameters(module):
        if parameter.is_complex():
            raise MisconfigurationException(
                f"The shared parameter `{name_of(module, parameter)}` is complex ({parameter.dtype}), but task"
                " gradients are vectors of real numbers. Hold it as a real tensor and use `torch.view_as_complex` in"
                " the forward pass, or freeze it."
            )


def trained_parameters(module: LightningModule) -> tuple[list[Parameter], bool]:
    """The shared parameters that the optimizer trains now, each once. There may be none for a while.

    They require a gradient, and are in a parameter group whose learning rate is not zero.

    Returns:
        The parameters, and whether these are all parameters of the shared modules.
    """
    groups = [group for optimizer in module.trainer.optimizers for group in optimizer.param_groups]
    learning = {id(parameter) for group in groups if _learns(group) for parameter in group["params"]}
    every = _all_parameters(module)
    trained = [parameter for parameter in every if parameter.requires_grad and id(parameter) in learning]
    return trained, len(trained) == len(every)


def _all_parameters(module: LightningModule) -> list[Parameter]:
    shared: dict[Parameter, None] = {}
    for part in shared_modules(module).values():
        shared.update(dict.fromkeys(part.parameters()))
    if not shared:
        raise MisconfigurationException(
            f"`shared_module={module.shared_module!r}` of {type(module).__name__} has no parameters. Name the module"
            " whose parameters the tasks share."
        )
    return list(shared)


def name_of(module: nn.Module, parameter: Parameter) -> str:
    """The dotted name of a parameter of a module."""
    return next(name for name, other in module.named_parameters() if other is parameter)


def _learns(group: dict[str, Any]) -> bool:
    rate = group.get("lr")
    # Some optimizers find their own learning rate.
    return rate is None or float(rate) != 0


def _find(module: LightningModule, path: str) -> nn.Module:
    try:
        found = reduce(getattr, path.split("."), module)
    except AttributeError as error:
        children = ", ".join(name for name, _ in module.named_children()) or "none"
        near = get_close_matches(path, [name for name, _ in module.named_modules()], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise MisconfigurationException(
            f"`shared_module={module.shared_module!r}`: {type(module).__name__} has no attribute {path!r}.{hint}"
            " Set the class attribute `shared_module` (default 'backbone') to the name of the attribute that holds the"
            f" shared module; its submodules are: {children}."
        ) from error
    if not isinstance(found, nn.Module):
        raise MisconfigurationException(
            f"`shared_module={module.shared_module!r}`: attribute {path!r} must be a torch.nn.Module; got"
            f" {type(found).__name__}."
        )
    return found
