"""States of the random number generators."""

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
    """The states of the global generators of torch (CPU and CUDA), NumPy and Python."""

    torch: Tensor
    cuda: list[Tensor]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls) -> RngState:
        """The states as they are now."""
        # Not `is_available` as well: without a GPU it loads a library each time, which takes longer than the rest.
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())  # noqa: NPY002

    def restore(self) -> None:
        """Set the global generators to these states."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the global generators on exit."""
    state = RngState.capture()
    try:
        yield
    finally:
        state.restore()
