"""Tensors of the shared parameters, concatenated into flat vectors of shape ``(P,)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.nn import Parameter

__all__: list[str] = []


def flatten(tensors: Sequence[Tensor | None], shared: Sequence[Parameter]) -> Tensor:
    """Concatenate one tensor per shared parameter into a vector of shape ``(P,)``. ``None`` stands for zeros."""
    out = torch.empty(num_elements(shared), device=shared[0].device, dtype=row_dtype(shared))
    assign(tensors, shared, out)
    return out


def zeros_like_shared(shared: Sequence[Parameter]) -> Tensor:
    """Zeros of shape ``(P,)``."""
    return torch.zeros(num_elements(shared), device=shared[0].device, dtype=row_dtype(shared))


def assign(tensors: Sequence[Tensor | None], shared: Sequence[Parameter], out: Tensor) -> None:
    """Write one tensor per shared parameter into a vector of shape ``(P,)``. ``None`` stands for zeros."""
    if all(tensor is not None and not tensor.is_sparse for tensor in tensors):
        torch.cat([tensor.detach().reshape(-1) for tensor in tensors if tensor is not None], out=out)
        return
    for view, tensor in zip(views(out, shared), tensors, strict=True):
        if tensor is None:
            view.zero_()
        else:
            view.copy_(tensor.to_dense() if tensor.is_sparse else tensor)


def accumulate(tensors: Sequence[Tensor | None], shared: Sequence[Parameter], out: Tensor, factor: float = 1.0) -> None:
    """Add ``factor`` times one tensor per shared parameter to a vector of shape ``(P,)``. ``None`` stands for zeros."""
    for view, tensor in zip(views(out, shared), tensors, strict=True):
        if tensor is not None:
            view.add_(tensor, alpha=factor)


def combine(matrix: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the rows of a matrix, shape ``(P,)``.

    With few and very long rows, adding them takes a third of the time of a matrix product.
    """
    weights = weights.to(matrix)
    combined = matrix[0] * weights[0]
    for row, weight in zip(matrix[1:], weights[1:], strict=True):
        combined.addcmul_(row, weight)
    return combined


def views(vector: Tensor, shared: Sequence[Parameter]) -> tuple[Tensor, ...]:
    """Views of a ``(P,)`` vector: one per shared parameter, in its shape."""
    pieces: tuple[Tensor, ...] = _unflatten_dense_tensors(vector, shared)
    return pieces


def columns(matrix: Tensor, shared: Sequence[Parameter]) -> Sequence[Tensor]:
    """Views of a ``(..., P)`` tensor: one per shared parameter, flat."""
    pieces: Sequence[Tensor] = matrix.split([parameter.numel() for parameter in shared], dim=-1)
    return pieces


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all elements of some tensors."""
    if not tensors:
        return 0.0
    # As `torch.nn.utils.get_total_norm`, which takes five times as long for a small network.
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors])
    return float(torch.stack([norm.to(norms[0]) for norm in norms]).norm())


def num_elements(shared: Sequence[Parameter]) -> int:
    """The number :math:`P` of elements of the shared parameters."""
    return sum(parameter.numel() for parameter in shared)


def row_dtype(shared: Sequence[Parameter]) -> torch.dtype:
    """The type of a vector: at least float32, because cosines of half-precision vectors are noise."""
    dtype = torch.float32
    for parameter in shared:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype
