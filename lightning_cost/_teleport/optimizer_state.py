"""What an optimizer keeps of its history after a teleport: historical trajectory reuse (Eq. 12 and 13)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from lightning_cost._arguments import check_choice, check_same_shape, check_within

__all__ = ["HISTORY_MODES", "History", "HistoryReuse", "modulate"]

History: TypeAlias = Literal["paper", "momentum", "keep", "reset"]
"""``"paper"``: Eq. 13. ``"momentum"``: Eq. 13, of the first moment only. ``"keep"``: all. ``"reset"``: nothing."""

HISTORY_MODES: tuple[History, ...] = get_args(History)

_ADAMS = (Adam, AdamW, NAdam, RAdam)
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def modulate(history: Tensor, fresh: Tensor, sigma: float) -> None:
    r"""Replace a running average by :math:`\sigma \cdot \text{history} + (1 - \sigma) \cdot \text{fresh}`, in place.

    Right before Adam's step, this is Eq. 13 in closed form. Adam updates an average by
    :math:`v_t = \beta_1 v_{t-1} + (1 - \beta_1) g_t`. From the replaced average this gives
    :math:`\sigma \beta_1 v_{t-1} + (1 - \sigma \beta_1) g_t`. The same holds for the second moment.

    Example:
        >>> v, g = torch.tensor([1.0]), torch.tensor([3.0])
        >>> modulate(v, g, sigma=0.5)
        >>> 0.9 * v + (1 - 0.9) * g, 0.5 * 0.9 * 1.0 + (1 - 0.5 * 0.9) * 3.0
        (tensor([2.1000]), 2.1)
    """
    check_same_shape("fresh", fresh, "history", history)
    check_within("sigma", sigma, 0, 1)
    history.lerp_(fresh.to(history.dtype), 1 - sigma)


class HistoryReuse:
    r"""Applies historical trajectory reuse in the optimizer step after a teleport.

    The optimizer calls its pre-step hook before the closure that computes the gradients. So the hook wraps the closure:
    the state is changed after gradient clipping, with the gradients that the step is about to use.

    :math:`\sigma` is clamped to [0, 1], because a negative one would make the second moment negative. Every mode but
    ``"paper"`` scales fresh moments by the bias corrections :math:`1 - \beta^t`. Without them, a step early in training
    is far too long. The momentum of SGD is a sum, not an average. Its fresh value is the sum that a constant gradient
    gives.

    Args:
        mode: What to keep, see :data:`History`.

    Raises:
        ValueError: If ``mode`` is unknown.
    """

    def __init__(self, mode: History) -> None:
        check_choice("history", mode, HISTORY_MODES)
        self.mode = mode
        self._armed: tuple[float, list[Parameter]] | None = None

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer whose state is unknown.

        Raises:
            MisconfigurationException: If it is refused.
        """
        if self.mode != "keep" and not isinstance(optimizer, (*_ADAMS, Adamax, SGD)):
            raise MisconfigurationException(
                f"`history={self.mode!r}` knows the state of Adam, AdamW, NAdam, RAdam, Adamax and SGD; got"
                f" {type(optimizer).__name__}. Use `history='keep'` with it."
            )

    def arm(self, sigma: float, parameters: Iterable[Parameter]) -> None:
        """Change the state of these parameters, the ones that moved, in the optimizer step under way."""
        if self.mode != "keep":
            self._armed = (min(max(sigma, 0.0), 1.0), list(parameters))

    def disarm(self) -> None:
        """Leave the state as it is."""
        self._armed = None

    def pre_step_hook(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """For ``optimizer.register_step_pre_hook``. Wraps the closure, or acts at once if there is none."""
        closure = kwargs["closure"] if "closure" in kwargs else next(iter(args[1:]), None)
        if closure is None:
            self._apply(optimizer)
            return None
        wrapped = self._wrap(closure, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _wrap(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def wrapped() -> Any:
            result = closure()
            self._apply(optimizer)
            return result

        return wrapped

    @torch.no_grad()
    def _apply(self, optimizer: Optimizer) -> None:
        if self._armed is None:
            return
        sigma, parameters = self._armed
        self._armed = None
        moved = {id(parameter) for parameter in parameters}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                if id(parameter) in moved and state and parameter.grad is not None:
                    self._apply_to(optimizer, group, parameter, state, sigma)

    def _apply_to(
        self, optimizer: Optimizer, group: dict[str, Any], parameter: Parameter, state: dict[str, Any], sigma: float
    ) -> None:
        if self.mode == "reset":
            _reset(state)
            return
        gradient = _effective_gradient(optimizer, group, parameter)
        if isinstance(optimizer, SGD):
            _modulate_sgd(group, state, gradient, sigma)
            return
        correction1 = 1.0 if self.mode == "paper" else 1 - group["betas"][0] ** float(state["step"])
        modulate(state["exp_avg"], correction1 * gradient, sigma)
        if self.mode == "paper":
            for name in _SECOND_MOMENTS:
                if name in state:
                    modulate(state[name], gradient.square(), sigma)
            if "exp_inf" in state:
                # A maximum is no average. The old maximum shrinks, and the step adds the fresh gradient.
                state["exp_inf"].mul_(sigma)


def _effective_gradient(optimizer: Optimizer, group: dict[str, Any], parameter: Parameter) -> Tensor:
    """The gradient that enters the moments: with L2 regularization, and with the sign of the optimization."""
    assert parameter.grad is not None
    gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
    if group.get("maximize", False):
        gradient = -gradient
    # AdamW of older versions of PyTorch does not say so in its groups.
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, AdamW))
    if group.get("weight_decay", 0) and not decoupled:
        gradient = gradient.add(parameter, alpha=group["weight_decay"])
    return gradient


def _modulate_sgd(group: dict[str, Any], state: dict[str, Any], gradient: Tensor, sigma: float) -> None:
    buffer = state.get("momentum_buffer")
    if buffer is not None:
        if buffer.is_sparse:
            buffer = state["momentum_buffer"] = buffer.to_dense()
        constant = gradient * ((1 - group["dampening"]) / (1 - group["momentum"]))
        modulate(buffer, constant, sigma)


def _reset(state: dict[str, Any]) -> None:
    if state.get("momentum_buffer") is not None:
        state["momentum_buffer"] = None
    for name, value in state.items():
        if isinstance(value, Tensor):
            value.fill_(1.0 if name == "mu_product" else 0.0)
