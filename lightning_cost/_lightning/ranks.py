"""Collective communication between the processes that train together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import Parameter

__all__: list[str] = []

_DISAGREE = (
    "{what}. Every process must come to the same result. A trigger, an objective or a search of your own must not"
    " depend on the rank or on global random numbers."
)


class Ranks:
    """Collectives over the processes of a data-parallel run. With one process they do nothing.

    Every process must call them in the same order.

    Args:
        size: Number of processes.
        device: Device of the tensors that are sent.
    """

    def __init__(self, size: int = 1, device: torch.device | None = None) -> None:
        self.size = size
        self.device = torch.device("cpu") if device is None else device

    @classmethod
    def of(cls, module: LightningModule) -> Ranks:
        """The processes of the Trainer of a module."""
        return cls(module.trainer.world_size, module.device)

    def mean_(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """All-reduce a contiguous tensor to its mean, in place.

        Args:
            tensor: The tensor, of the same shape on every process.
            dtype: Type to send it as; ``None`` for its own.
        """
        if self.size > 1 and tensor.numel() > 0:
            if dtype is None or dtype == tensor.dtype:
                dist.all_reduce(tensor)
                tensor.div_(self.size)
            else:
                sent = (tensor / self.size).to(dtype)
                dist.all_reduce(sent)
                tensor.copy_(sent)
        return tensor

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags are true on at least one process."""
        if self.size == 1:
            return list(flags)
        seen = torch.tensor(flags, device=self.device, dtype=torch.int32)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in seen.tolist()]

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor, on any device, by that of rank 0."""
        if self.size > 1:
            sent = tensor.to(self.device).contiguous()
            dist.broadcast(sent, src=0)
            if sent is not tensor:
                tensor.copy_(sent)
        return tensor

    def decide(self, decision: bool) -> bool:
        """The decision of rank 0."""
        return bool(self.broadcast_(torch.tensor(int(decision), device=self.device))) if self.size > 1 else decision

    def agree(self, decision: bool) -> bool:
        """Check that all processes decided the same.

        Raises:
            RuntimeError: On every process, if the decisions differ.
        """
        some, not_all = self.any_of([decision, not decision])
        if some and not_all:
            raise RuntimeError(_DISAGREE.format(what="Some processes accept a point and others refuse it"))
        return decision

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes. They are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Run a block on every process. If it fails on one process, it fails on all.

        The block must not communicate before it fails, as ``SyncBatchNorm`` does.

        Raises:
            RuntimeError: If the block failed on another process. Without this error, this process would wait forever.
        """
        try:
            yield
        except Exception:
            self.any_of([True])
            raise
        if self.any_of([False])[0]:
            raise RuntimeError("Another process failed at this point. Its own error message says why.")

    def mean_gradients_(self, parameters: Sequence[Parameter]) -> None:
        """All-reduce ``.grad`` to its mean. A process without a ``.grad`` counts as zero."""
        if self.size == 1:
            return
        sparse = [parameter for parameter in parameters if parameter.grad is not None and parameter.grad.is_sparse]
        if self.any_of([bool(sparse)])[0]:
            raise RuntimeError(
                "A teleport on several processes does not support sparse gradients. Use `sparse=False` in"
                " torch.nn.Embedding."
            )
        present = self.any_of([parameter.grad is not None for parameter in parameters])
        chosen = [parameter for parameter, flag in zip(parameters, present, strict=True) if flag]
        for parameter in chosen:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for dtype in sorted({parameter.dtype for parameter in chosen}, key=str):
            gradients = [parameter.grad for parameter in chosen if parameter.dtype == dtype]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients if gradient is not None])
            pieces = self.mean_(flat).split([parameter.numel() for parameter in chosen if parameter.dtype == dtype])
            for gradient, piece in zip(gradients, pieces, strict=True):
                assert gradient is not None
                gradient.copy_(piece.view(gradient.shape))

    def check_equal(self, tensors: Sequence[Tensor]) -> None:
        """Compare tensors across the processes by their checksums.

        Raises:
            RuntimeError: On every process, if they differ.
        """
        if self.size == 1:
            return
        sums = torch.stack([tensor.detach().sum(dtype=torch.float64) for tensor in tensors])
        extremes = torch.cat([sums, -sums])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        high, low = extremes.chunk(2)
        different = int((high != -low).sum())
        if different:
            what = f"{different} of {len(tensors)} shared parameters differ between the processes after a teleport"
            raise RuntimeError(_DISAGREE.format(what=what))
