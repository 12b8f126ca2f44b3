"""What multi-task methods remember from call to call, in and out of checkpoints.

TorchJD's methods keep it in plain attributes, in optimizers of their own and in buffers that exist only after the first
call. A ``state_dict`` has none of the former, and what it has of the latter does not load into a new module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torchjd import Stateful

__all__: list[str] = []


class _Memory:
    """The attributes in which a class remembers something.

    Args:
        names: Their names.
        stays_on_cpu: Whether the class computes on the CPU, whatever the device of the module is.
        derive: Sets what else follows from them.
    """

    def __init__(
        self, *names: str, stays_on_cpu: bool = False, derive: Callable[[Any], None] = lambda part: None
    ) -> None:
        self.names = names
        self.stays_on_cpu = stays_on_cpu
        self.derive = derive

    def save(self, part: nn.Module) -> dict[str, Any]:
        return {name: _plain(getattr(part, name)) for name in self.names}

    def load(self, part: nn.Module, state: dict[str, Any], device: torch.device) -> None:
        for name in self.names:
            setattr(part, name, _restored(state[name], torch.device("cpu") if self.stays_on_cpu else device))
        self.derive(part)


class _AdamMemory(_Memory):
    """The Adam that FAMO makes for its logits when it first updates them."""

    def save(self, part: nn.Module) -> dict[str, Any]:
        adam: Any = part._optimizer
        return {"_optimizer": None if adam is None else _plain(adam.state_dict()["state"])}

    def load(self, part: Any, state: dict[str, Any], device: torch.device) -> None:
        part._optimizer = None
        if state["_optimizer"] is not None:
            part._optimizer = Adam([part._w], lr=part.lr, weight_decay=part.weight_decay)
            part._optimizer.load_state_dict({**part._optimizer.state_dict(), "state": state["_optimizer"]})


def _derive_gradvac(part: Any) -> None:
    phi = part._phi_t
    part._state_key = None if phi is None else (len(phi), phi.dtype)


def _derive_pcd(part: Any) -> None:
    average = part._sq_norm_ema
    part._state_key = None if average is None else len(average)


def _derive_excess(part: Any) -> None:
    squares = part._sq_grad_sum
    part._state_key = None if squares is None else (*squares.shape, squares.dtype, squares.device)


def _derive_nash(part: Any) -> None:
    # Otherwise the first call does it.
    if part.step != 0:
        part._init_optim_problem()


# By name, since not all are public, and none need be there in every version of TorchJD.
_MEMORIES = {
    "UW": _Memory(),
    "IMTLL": _Memory(),
    "DWA": _Memory("_loss_sum", "_n_batches", "_previous_averages"),
    "FAMO": _AdamMemory("_optimizer"),
    "GradVac": _Memory(),
    "GradVacWeighting": _Memory("_phi_t", stays_on_cpu=True, derive=_derive_gradvac),
    "PCD": _Memory(),
    "PCDWeighting": _Memory("_sq_norm_ema", "_n_steps", stays_on_cpu=True, derive=_derive_pcd),
    "ExcessMTL": _Memory(),
    "ExcessMTLWeighting": _Memory(
        "_weights", "_sq_grad_sum", "_initial_w", "_warmup_w_sum", "_n_steps", derive=_derive_excess
    ),
    "NashMTL": _Memory(),
    "_NashMTLWeighting": _Memory("normalization_factor", "step", "prvs_alpha", derive=_derive_nash),
    "CRMOGMWeighting": _Memory("_lambda"),
}


def state_of(method: nn.Module) -> dict[str, Any]:
    """What a method remembers, by the path of the module within it: tensors on the CPU and plain Python values."""
    return {
        path: {"class": type(part).__name__, "values": memory.save(part)} for path, part, memory in _remembering(method)
    }


def load_state(method: nn.Module, state: dict[str, Any], device: torch.device) -> None:
    """The inverse of :func:`state_of`, on a device. What another class remembered is left out."""
    for path, part, memory in _remembering(method):
        saved = state.get(path, {})
        if saved.get("class") == type(part).__name__:
            memory.load(part, saved["values"], device)


def keep_apart(method: nn.Module) -> None:
    """Have no ``state_dict`` hold the buffers that :func:`state_of` holds: before the first call they do not exist."""
    for _, part, memory in _remembering(method):
        part._non_persistent_buffers_set.update(name for name in memory.names if name in part._buffers)


def untouched_by_backward(method: nn.Module) -> list[str]:
    """Names of parameters and buffers that a method changes by itself, and DDP must not wait for nor send."""
    names = [
        f"{path}.{name}" if path else name
        for path, part, memory in _remembering(method)
        for name in (("_w",) if isinstance(memory, _AdamMemory) else memory.names)
    ]
    known = {name for name, _ in (*method.named_parameters(), *method.named_buffers())}
    return [name for name in names if name in known]


def forgetful(method: nn.Module) -> list[str]:
    """The classes within a method whose state is not known in full, and which do not say themselves how to save it."""
    remembering = {part: memory for _, part, memory in _remembering(method)}
    return [
        type(part).__name__
        for part in method.modules()
        if isinstance(part, Stateful)
        and not (part in remembering and type(part).__module__.startswith("torchjd."))
        and type(part).get_extra_state is nn.Module.get_extra_state
    ]


def move_constants(method: nn.Module, device: torch.device) -> None:
    """Move the plain tensors that a method was made with, such as weights, where those of the module are."""
    for part in method.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                vars(part)[name] = value.to(device)


def _remembering(method: nn.Module) -> Iterator[tuple[str, nn.Module, _Memory]]:
    for path, part in method.named_modules():
        bases = (base for base in type(part).__mro__ if base.__module__.startswith("torchjd."))
        memory = next((_MEMORIES[base.__name__] for base in bases if base.__name__ in _MEMORIES), None)
        if memory is not None and all(hasattr(part, name) for name in memory.names):
            yield path, part, memory


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return {"numpy": torch.from_numpy(value)}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _restored(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        # A copy: some methods write into theirs.
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return value["numpy"].cpu().numpy().copy()
    return [_restored(entry, device) for entry in value] if isinstance(value, list) else value
