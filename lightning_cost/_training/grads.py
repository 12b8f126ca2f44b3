"""What ``.grad`` of some parameters is, to notice whether anybody changes it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

__all__: list[str] = []


class GradMark:
    """Remembers what ``.grad`` of some parameters is, without a copy.

    It notices another tensor, a write into the tensor, and, by the norm, a write through ``.data``.

    Args:
        parameters: The parameters.
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        pairs = [(parameter, parameter.grad) for parameter in parameters]
        self._grads = [(parameter, grad, _version(grad)) for parameter, grad in pairs]
        self._norms = _norms([grad for _, grad in pairs])

    def edited(self, factor: float = 1.0, by_norm: bool = True) -> Parameter | None:
        """A parameter whose ``.grad`` is another one now; ``None`` if there is none.

        Args:
            factor: What a gradient scaler has multiplied ``.grad`` with meanwhile.
            by_norm: Whether to compare norms, for which a program waits for a GPU.
        """
        for parameter, grad, version in self._grads:
            if parameter.grad is not grad or (factor == 1 and _version(grad) != version):
                return parameter
        if not by_norm:
            return None
        now = _norms([grad for _, grad, _ in self._grads])
        tolerance = 0.0 if factor == 1 else 1e-3
        same = torch.isclose(now, self._norms * factor, rtol=tolerance, atol=0.0, equal_nan=True)
        if bool(same.all()):
            return None
        present = [parameter for parameter, grad, _ in self._grads if grad is not None]
        return present[int(same.logical_not().nonzero()[0])]


def _version(grad: Tensor | None) -> int:
    return -1 if grad is None else grad._version


def _norms(grads: list[Tensor | None]) -> Tensor:
    values = [grad.coalesce().values() if grad.is_sparse else grad.detach() for grad in grads if grad is not None]
    if not values:
        return torch.zeros(0)
    # All at once: on a GPU, one kernel for each parameter takes longer than the norms.
    norms: list[Tensor] = torch._foreach_norm(values)  # type: ignore[assignment]
    return torch.stack([norm.float() for norm in norms])
