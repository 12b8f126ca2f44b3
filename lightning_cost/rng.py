"""Random number generator states: replaying a forward pass draws the same numbers, and leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__: list[str] = []


@dataclass(frozen=True)
class RngState:
    """The states of the global generators of torch (CPU and CUDA), numpy and Python."""

    torch: Tensor
    cuda: list[Tensor]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls) -> RngState:
        """The states as they are now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())  # noqa: NPY002

    def restore(self) -> None:
        """Set the global generators to these states."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python values only, so that ``torch.load(weights_only=True)`` reads it."""
        name, keys, position, has_gauss, gauss = self.numpy
        version, internal, gauss_next = self.python
        return {
            "torch": self.torch,
            "cuda": self.cuda,
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "python": [version, list(internal), gauss_next],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RngState:
        """The inverse of :meth:`state_dict`."""
        name, keys, position, has_gauss, gauss = state["numpy"]
        version, internal, gauss_next = state["python"]
        return cls(
            state["torch"].cpu(),
            [tensor.cpu() for tensor in state["cuda"]],
            (name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss),
            (version, tuple(internal), gauss_next),
        )


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the global generators on exit."""
    state = RngState.capture()
    try:
        yield
    finally:
        state.restore()
