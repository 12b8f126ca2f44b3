"""What multi-task methods remember from step to step, in and out of checkpoints.

TorchJD's methods keep it in plain attributes, in optimizers of their own, and in buffers that exist only after the
first call. A ``state_dict`` holds neither the attributes nor the optimizers, and such buffers do not load into a new
module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torchjd import Stateful

from lightning_cost._lightning.state import ModuleState

__all__: list[str] = []


def tensors_off_cpu(method: nn.Module) -> bool:
    """Whether a method holds a tensor on another device than the CPU."""
    values = [value for part in method.modules() for value in (*vars(part).values(), *part._buffers.values())]
    return any(isinstance(v, Tensor) and v.device.type != "cpu" for v in (*values, *method.parameters()))


class _Remembered:
    """The attributes in which a class remembers something.

    Args:
        names: Their names.
        stays_on_cpu: Whether the class computes on the CPU, whatever the device of the module.
        derive: Sets the attributes that follow from these.
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


class _RememberedAdam(_Remembered):
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


# By name: not all are public, and a version of TorchJD may lack some.
_REMEMBERED = {
    "UW": _Remembered(),
    "IMTLL": _Remembered(),
    "DWA": _Remembered("_loss_sum", "_n_batches", "_previous_averages"),
    "FAMO": _RememberedAdam("_optimizer"),
    "GradVac": _Remembered(),
    "GradVacWeighting": _Remembered("_phi_t", stays_on_cpu=True, derive=_derive_gradvac),
    "PCD": _Remembered(),
    "PCDWeighting": _Remembered("_sq_norm_ema", "_n_steps", stays_on_cpu=True, derive=_derive_pcd),
    "ExcessMTL": _Remembered(),
    "ExcessMTLWeighting": _Remembered(
        "_weights", "_sq_grad_sum", "_initial_w", "_warmup_w_sum", "_n_steps", derive=_derive_excess
    ),
    "NashMTL": _Remembered(),
    "_NashMTLWeighting": _Remembered("normalization_factor", "step", "prvs_alpha", derive=_derive_nash),
    "CRMOGMWeighting": _Remembered("_lambda"),
}


def snapshot(method: object) -> ModuleState:
    """What a multi-task method and its parts remember now; anything but a module remembers nothing."""
    return ModuleState(method.modules() if isinstance(method, nn.Module) else ())


class MethodState:
    """The state of a method across epochs, fits and checkpoints.

    Attributes:
        epoch: The epoch of the last training batch; ``None`` before the first.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self._loaded: dict[str, Any] | None = None

    def start(self, method: nn.Module | None, device: torch.device, end_epoch: Callable[[], None]) -> None:
        """Make a method ready for a fit.

        Args:
            method: The method.
            device: The device of the module, which may be another one than in an earlier fit.
            end_epoch: Tells the method that an epoch has ended.
        """
        if method is None:
            self.epoch = self._loaded = None
            return
        exclude_from_state_dict(method)
        _move_constants(method, device)
        if self._loaded is None:
            # The last epoch of an earlier fit has not been ended yet: the first batch of the next epoch would do that.
            if self.epoch is not None:
                end_epoch()
            self._loaded = {"epoch": None, "parts": state_of(method)}
        self.load_pending(method, device)

    def load_pending(self, method: nn.Module | None, device: torch.device) -> None:
        """Load a checkpoint's state. Some strategies load checkpoints after the fit has started."""
        if method is not None and self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self.epoch = loaded["epoch"]
            load_state(method, loaded["parts"], device)

    def enter_epoch(self, epoch: int, end_epoch: Callable[[], None]) -> None:
        """Notice at a training batch that its epoch is a new one."""
        if self.epoch is not None and self.epoch != epoch:
            end_epoch()
        self.epoch = epoch

    def state_dict(self, method: nn.Module | None) -> dict[str, Any]:
        """The state, readable by ``torch.load(weights_only=True)``."""
        if self._loaded is not None:
            return self._loaded
        return {} if method is None else {"epoch": self.epoch, "parts": state_of(method)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state when the next fit starts, on its device."""
        self._loaded = state or None


def state_of(method: nn.Module) -> dict[str, Any]:
    """What a method remembers, by the path of each of its parts: tensors on the CPU and plain Python values."""
    return {
        path: {"class": type(part).__name__, "values": remembered.save(part)}
        for path, part, remembered in _remembering(method)
    }


def load_state(method: nn.Module, state: dict[str, Any], device: torch.device) -> None:
    """The inverse of :func:`state_of`, on a device. The state of another class is ignored."""
    for path, part, remembered in _remembering(method):
        saved = state.get(path, {})
        if saved.get("class") == type(part).__name__:
            remembered.load(part, saved["values"], device)


def exclude_from_state_dict(method: nn.Module) -> None:
    """Exclude from the ``state_dict`` the buffers that :func:`state_of` saves. Before the first call they do not exist.

    A ``state_dict`` with such a buffer would not load into a new module.
    """
    for _, part, remembered in _remembering(method):
        part._non_persistent_buffers_set.update(name for name in remembered.names if name in part._buffers)


def changed_without_backward(method: nn.Module) -> list[str]:
    """Names of the parameters and buffers that a method changes by itself. DDP must neither reduce nor send them."""
    names = [
        f"{path}.{name}" if path else name
        for path, part, remembered in _remembering(method)
        for name in (("_w",) if isinstance(remembered, _RememberedAdam) else remembered.names)
    ]
    known = {name for name, _ in (*method.named_parameters(), *method.named_buffers())}
    return [name for name in names if name in known]


def of_unknown_state(method: nn.Module) -> list[str]:
    """The stateful classes within a method that are not known here and have no ``get_extra_state`` of their own."""
    known = {part for _, part, _ in _remembering(method)}
    return [
        type(part).__name__
        for part in method.modules()
        if isinstance(part, Stateful)
        and not (part in known and type(part).__module__.startswith("torchjd."))
        and type(part).get_extra_state is nn.Module.get_extra_state
    ]


def _move_constants(method: nn.Module, device: torch.device) -> None:
    """Move plain tensor attributes of a method, such as its weights, to the device of the module."""
    for part in method.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                vars(part)[name] = value.to(device)


def remembered_names(part: nn.Module) -> frozenset[str]:
    """The attributes in which a part of a method remembers something."""
    remembered = _remembered_of(part)
    return frozenset() if remembered is None else frozenset(remembered.names)


def derive(part: nn.Module) -> None:
    """Set the attributes of a part that follow from what it remembers."""
    remembered = _remembered_of(part)
    if remembered is not None:
        remembered.derive(part)


def _remembered_of(part: nn.Module) -> _Remembered | None:
    bases = (base for base in type(part).__mro__ if base.__module__.startswith("torchjd."))
    found = next((_REMEMBERED[base.__name__] for base in bases if base.__name__ in _REMEMBERED), None)
    return found if found is not None and all(hasattr(part, name) for name in found.names) else None


def _remembering(method: nn.Module) -> Iterator[tuple[str, nn.Module, _Remembered]]:
    for path, part in method.named_modules():
        remembered = _remembered_of(part)
        if remembered is not None:
            yield path, part, remembered


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
