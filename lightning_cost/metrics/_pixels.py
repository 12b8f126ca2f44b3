"""Metrics of the valid pixels of images, averaged over all of them or batch by batch."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_cost.metrics._precision import PreciseMetric, check_real

__all__ = ["Average", "PixelMetric", "check_shapes"]

Average = Literal["pixels", "batch"]


class PixelMetric(PreciseMetric):
    """A metric that averages quantities over valid pixels.

    Related metrics keep the same sums, even those that only another of them uses. So a `torchmetrics.MetricCollection`
    computes the sums once. It shares states that have the same names, and the same values after the first batch. If a
    first batch has no valid pixel, all values are zero. Therefore the name of the count says what it counts, pixels or
    batches.

    Args:
        average: ``"pixels"``: every valid pixel counts the same. ``"batch"``: every batch counts the same.
        **kwargs: Arguments of every metric, see `torchmetrics.Metric`.
    """

    def __init__(self, average: Average, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if average not in get_args(Average):
            raise ValueError(f"`average` must be one of {list(get_args(Average))}, got {average!r}.")
        self.average = average
        self._count = "num_pixels" if average == "pixels" else "num_batches"
        self._add_sum(self._count)
        self._is_batch_value = False

    def _add_batch(self, pixels: Tensor, **sums: Tensor) -> None:
        """Add sums over the valid pixels of a batch. There may be none."""
        count = getattr(self, self._count)
        pixels = pixels.to(count)
        share = torch.ones_like(pixels) if self.average == "pixels" else 1 / pixels.clamp(min=1)
        for name, value in sums.items():
            state = getattr(self, name)
            setattr(self, name, state + share * value.to(state))
        setattr(self, self._count, count + (pixels if self.average == "pixels" else pixels > 0))

    def _mean(self, name: str) -> Tensor:
        """One of the sums, divided by the number of pixels or batches."""
        count: Tensor = getattr(self, self._count)
        if not self._is_batch_value and not count.item():
            raise RuntimeError(
                f"`{type(self).__name__}` has nothing to compute: no pixel was valid since the last reset. Call"
                " `update` with valid pixels first."
            )
        mean: Tensor = getattr(self, name) / count
        return mean

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch.

        Returns:
            The value of this batch; NaN if it has no valid pixel.
        """
        self._is_batch_value = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._is_batch_value = False


def check_shapes(preds: Tensor, target: Tensor, mask: Tensor | None, mask_shape: torch.Size) -> None:
    """Refuse predictions, targets and masks that do not belong together.

    Args:
        preds: The predictions.
        target: What they are compared with, of the same shape.
        mask: Booleans of shape `mask_shape`, if there is a mask.
        mask_shape: The shape with one element per pixel.

    Raises:
        TypeError: If the mask does not hold booleans, or the others real numbers.
        ValueError: If a shape does not fit.
    """
    check_real("preds", preds)
    check_real("target", target)
    if preds.shape != target.shape:
        raise ValueError(
            f"`preds` and `target` must have the same shape, got {tuple(preds.shape)} and {tuple(target.shape)}."
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"`mask` must hold booleans in a tensor, got {kind}.")
    if mask.shape != mask_shape:
        raise ValueError(f"`mask` must have shape {tuple(mask_shape)}, one element per pixel, got {tuple(mask.shape)}.")
