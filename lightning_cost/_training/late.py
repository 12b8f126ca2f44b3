"""Looking at the losses of a step without waiting for the device that computes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_cost._training.evaluate import check_finite, values_of

__all__: list[str] = []


class LateCheck:
    """Refuses losses that are not finite.

    A GPU works behind the program. To read a loss right away, the program would wait for it in every step. So the
    losses are copied when the GPU gets there, and looked at later.

    Args:
        losses: The losses by task, not empty.
        step: The number of optimizer steps so far.
    """

    def __init__(self, losses: Mapping[str, Tensor], step: int) -> None:
        values = values_of(losses)
        self._step = step
        self._names = tuple(losses)
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def finish(self, step: int) -> None:
        """Look at the losses.

        Args:
            step: The number of optimizer steps so far.

        Raises:
            ValueError: If one is not finite.
        """
        if self._event is not None:
            self._event.synchronize()
        if not bool(torch.isfinite(self._values).all()):
            is_over = step > self._step
            what = "The loss in the step before" if is_over else "The loss"
            check_finite(dict(zip(self._names, self._values.tolist(), strict=True)), what, is_over)


def waits_for(losses: Mapping[str, Tensor]) -> bool:
    """Whether the program would wait for the device of some losses."""
    return any(loss.is_cuda for loss in losses.values())
