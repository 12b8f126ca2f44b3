"""Angles between predicted and true surface normals, at the pixels whose normal is known."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_cost.metrics._pixels import Average, PixelMetric, check_shapes
from lightning_cost.metrics._precision import at_least_single, check_real

__all__ = ["MeanNormalAngle", "MedianNormalAngle", "NormalsWithin", "normal_angles"]

_BINS_PER_DEGREE = 100


def normal_angles(preds: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Angles between predicted and true surface normals at the valid pixels, in degrees.

    Normals need not have unit length. A prediction of length zero has no direction, and counts as 90 degrees off.
    Predictions at other pixels do not matter, even if they are not finite.

    The angle is ``2 atan2(|a - b|, |a + b|)`` for unit vectors ``a`` and ``b``. This is exact at every angle. The arc
    cosine of their product is not: near zero, single precision rounds it to multiples of 0.02 degrees, and it can be
    out of range.

    Args:
        preds: Predicted normals, shape :math:`(B, 3, \ldots)`.
        target: True normals, of the same shape; all zero where the normal is unknown.
        mask: The pixels to count, booleans of shape :math:`(B, \ldots)`. Default: those whose true normal is not zero.
            It must not be zero at any pixel of the mask.

    Returns:
        Angles from 0 to 180, shape (number of valid pixels,), in single precision or better.

    Raises:
        TypeError: If ``mask`` does not hold booleans.
        ValueError: If a shape does not fit.

    Example:
        >>> from torch import tensor
        >>> from lightning_cost.metrics import normal_angles
        >>> preds = tensor([[0.0, 0.0, 2.0], [0.0, 3.0, 3.0], [1.0, 0.0, 0.0]])
        >>> target = tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        >>> normal_angles(preds, target)
        tensor([ 0., 45.])
    """
    check_real("preds", preds)
    check_real("target", target)
    if target.ndim < 2 or target.shape[1] != 3:
        raise ValueError(f"`target` must have shape (B, 3, ...), got {tuple(target.shape)}.")
    check_shapes(preds, target, mask, target[:, 0].shape)
    known = (target != 0).any(dim=1)
    valid = known if mask is None else mask
    unknown = 0 if mask is None else int((mask & ~known).sum())
    if unknown:
        raise ValueError(
            f"`target` must not be zero at a pixel of the `mask`, since zero has no direction; {unknown} are. Leave"
            " them out of the mask, for example by `mask & (target != 0).any(dim=1)`."
        )
    predicted, true = (normalize(at_least_single(x).movedim(1, -1)[valid], dim=-1) for x in (preds, target))
    return torch.rad2deg(2 * torch.atan2((predicted - true).norm(dim=-1), (predicted + true).norm(dim=-1)))


class _NormalAngles(PixelMetric):
    is_differentiable = False

    angle: Tensor
    median: Tensor
    histogram: Tensor

    def __init__(self, average: Average = "pixels", **kwargs: Any) -> None:
        super().__init__(average, **kwargs)
        self._add_sum("angle")
        self._add_sum("median")
        self._add_sum("histogram", 180 * _BINS_PER_DEGREE)

    def update(self, preds: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch."""
        angles = normal_angles(preds, target, mask)
        pixels = len(angles)
        if not pixels:
            return
        bins = (angles * _BINS_PER_DEGREE).long().clamp(0, len(self.histogram) - 1)
        ordered = angles.sort().values
        self._add_batch(
            torch.tensor(pixels, device=angles.device),
            angle=angles.sum(dtype=self.angle.dtype),
            # As in NumPy, the median of an even number of angles is the mean of the two in the middle.
            median=pixels * (ordered[(pixels - 1) // 2] + ordered[pixels // 2]) / 2,
            histogram=torch.bincount(bins, minlength=len(self.histogram)),
        )

    def _checked(self, value: Tensor) -> Tensor:
        # The histogram hides a NaN in some bin, but a prediction that is NaN must show in every result.
        return self._as_result(value + 0 * self._mean("angle"))


class MeanNormalAngle(_NormalAngles):
    r"""Mean angle between predicted and true surface normals over the valid pixels, in degrees.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``preds`` (`torch.Tensor`): Predicted normals of any length, shape :math:`(B, 3, H, W)`
    - ``target`` (`torch.Tensor`): True normals, of the same shape; all zero where the normal is unknown
    - ``mask`` (`torch.Tensor`, optional): The pixels to count, booleans of shape :math:`(B, H, W)`. Default: those
      whose true normal is not zero

    Predictions at other pixels do not matter, even if they are not finite. A batch without valid pixels is skipped, and
    ``forward`` returns NaN for it.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``mean_normal_angle`` (`torch.Tensor`): A scalar

    Args:
        average: ``"pixels"``: the mean over all valid pixels, as in LibMTL. ``"batch"``: the mean of each batch, then
            the mean over the batches, as in the public code of MTAN and of later methods. This depends on the batch
            size if batches differ in their number of valid pixels.
        **kwargs: Arguments of every metric, see `torchmetrics.Metric`.

    Raises:
        TypeError: In an update, if ``mask`` does not hold booleans.
        ValueError: If ``average`` is unknown; in an update, if a shape does not fit.
        RuntimeError: In ``compute``, if there was no valid pixel yet.

    Example:
        >>> from torch import tensor
        >>> from lightning_cost.metrics import MeanNormalAngle
        >>> metric = MeanNormalAngle()
        >>> metric.update(tensor([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]]), tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
        >>> metric.update(tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]]), tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
        >>> metric.compute()
        tensor(45.)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The mean angle over all batches since the last reset."""
        return self._checked(self._mean("angle"))


class MedianNormalAngle(_NormalAngles):
    """Median angle between predicted and true surface normals over the valid pixels, in degrees.

    The input is that of `MeanNormalAngle`.

    With ``average="pixels"``, the median comes from a histogram of the angles, so it is up to 0.005 degrees off. The
    histogram needs the same memory for any number of pixels, and can be added over processes. With ``average="batch"``,
    the result is the mean of the exact medians of the batches.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``median_normal_angle`` (`torch.Tensor`): A scalar

    Args:
        average: ``"pixels"``: the median of all valid pixels. ``"batch"``: the mean of the medians of the batches.
        **kwargs: Arguments of every metric, see `torchmetrics.Metric`.

    Raises:
        TypeError: In an update, if ``mask`` does not hold booleans.
        ValueError: If ``average`` is unknown; in an update, if a shape does not fit.
        RuntimeError: In ``compute``, if there was no valid pixel yet.

    Example:
        >>> from torch import tensor
        >>> from lightning_cost.metrics import MedianNormalAngle
        >>> metric = MedianNormalAngle(average="batch")
        >>> metric.update(tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 2.0]]), tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
        >>> metric.update(tensor([[0.0, 1.0, 0.0]]), tensor([[0.0, 0.0, 1.0]]))
        >>> metric.compute()
        tensor(56.2500)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The median of all pixels, or the mean of the medians of the batches, since the last reset."""
        if self.average == "batch":
            return self._checked(self._mean("median"))
        # Integers: on a GPU, the order in which floats are added, and so the sum, differs from call to call.
        pixels: Tensor = getattr(self, self._count).long()
        middle = torch.stack([(pixels + 1) // 2, pixels // 2 + 1])
        bins = torch.searchsorted(self.histogram.long().cumsum(dim=0), middle)
        return self._checked((bins.to(self.histogram) + 0.5).mean() / _BINS_PER_DEGREE)


class NormalsWithin(_NormalAngles):
    """Fraction of the valid pixels whose predicted surface normal is off by less than an angle.

    The input is that of `MeanNormalAngle`.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``normals_within`` (`torch.Tensor`): A scalar between 0 and 1

    Args:
        degrees: The angle, a multiple of 0.01 degrees up to 180. Benchmarks report 11.25, 22.5 and 30.
        average: ``"pixels"``: the fraction of all valid pixels. ``"batch"``: the mean of the fractions of the batches.
        **kwargs: Arguments of every metric, see `torchmetrics.Metric`.

    Raises:
        TypeError: In an update, if ``mask`` does not hold booleans.
        ValueError: If ``degrees`` is out of range or ``average`` is unknown; in an update, if a shape does not fit.
        RuntimeError: In ``compute``, if there was no valid pixel yet.

    Example:
        In a collection, the metrics share their work:

        >>> from torch import tensor
        >>> from torchmetrics import MetricCollection
        >>> from lightning_cost.metrics import MeanNormalAngle, NormalsWithin
        >>> metrics = MetricCollection({"mean": MeanNormalAngle(), "within_30": NormalsWithin(30)})
        >>> metrics(tensor([[0.0, 0.0, 2.0], [0.0, 2.0, 2.0]]), tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
        {'mean': tensor(22.5000), 'within_30': tensor(0.5000)}
    """

    higher_is_better = True

    def __init__(self, degrees: float, average: Average = "pixels", **kwargs: Any) -> None:
        super().__init__(average, **kwargs)
        given: object = degrees
        number = isinstance(given, Real) and not isinstance(given, bool)
        bins = float(degrees) * _BINS_PER_DEGREE if number else math.nan
        if not 0 < bins <= len(self.histogram) or not math.isclose(bins, round(bins)):
            raise ValueError(
                f"`degrees` must be a multiple of {1 / _BINS_PER_DEGREE} above 0 and at most 180, got {degrees!r}."
            )
        self.degrees = degrees
        self._bins = round(bins)

    def compute(self) -> Tensor:
        """The fraction over all batches since the last reset."""
        return self._checked(self._mean("histogram")[: self._bins].sum())
