"""Counting where the program would wait for a GPU to read a tensor."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd.aggregation import GramianWeightedAggregator

from lightning_cost._training import engine, late
from lightning_cost._training.method import AggregatorMethod

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")


class OnHost(Tensor):
    """A tensor that was read from the device, or follows from one. Reading it again costs nothing."""


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the reads of tensors, by the file and the line that ask for them, as if they were on a GPU.

    On a CPU nothing has to wait, so the methods that would read from a GPU are counted themselves. Losses that are
    looked at late were copied meanwhile.
    """
    counts: Counter[str] = Counter()
    depth = 0

    def counted(name: str, ordinary: Any) -> Any:
        def read(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            caller = sys._getframe(1)
            free = depth > 0 or isinstance(self, OnHost) or caller.f_code.co_filename == late.__file__
            if not free:
                counts[f"{caller.f_code.co_filename}:{caller.f_lineno} {name}"] += 1
            depth += 1
            try:
                result = ordinary(self, *args, **kwargs)
            finally:
                depth -= 1
            return result.as_subclass(OnHost) if name == "cpu" else result

        return read

    def on_host(ordinary: Any) -> Any:
        def combined(self: Any, gradients: Any, gramian: Tensor, *args: Any) -> Any:
            nonlocal depth
            # Weights that follow from a Gramian on the CPU.
            free = isinstance(gramian, OnHost) and isinstance(self.wrapped, GramianWeightedAggregator)
            depth += free
            try:
                return ordinary(self, gradients, gramian, *args)
            finally:
                depth -= free

        return combined

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, counted(name, getattr(Tensor, name)))
        patch.setattr(AggregatorMethod, "_combined", on_host(AggregatorMethod._combined))
        patch.setattr(torch, "equal", counted("equal", torch.equal))
        patch.setattr(engine, "waits_for", lambda losses: True)
        yield counts
