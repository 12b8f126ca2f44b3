"""Errors of predicted depth, at the pixels whose depth is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_cost._arguments import check_bool
from lightning_cost.metrics._pixels import Average, PixelMetric, check_shapes
from lightning_cost.metrics._precision import at_least_single, check_real, state_dtype

__all__ = ["AbsoluteDepthError", "RelativeDepthError", "depth_error"]


def depth_error(preds: Tensor, target: Tensor, mask: Tensor | None = None, *, relative: bool = False) -> Tensor:
    r"""Mean error of predicted depth over the valid pixels :math:`V`, absolute or relative.

    .. math:: \frac{1}{|V|} \sum_{p \in V} |\hat{d}_p - d_p|
        \qquad\text{or}\qquad \frac{1}{|V|} \sum_{p \in V} \frac{|\hat{d}_p - d_p|}{d_p}

    Predictions at other pixels do not matter, even if they are not finite.

    Args:
        preds: Predicted depth :math:`\hat{d}`, of any shape.
        target: True depth :math:`d`, of the same shape and in the same unit. Both may be inverse depth.
        mask: The pixels to count, booleans of the same shape. Default: those whose ``target`` is positive. For the
            relative error, all pixels of the mask must have a positive ``target``, because the error divides by it.
        relative: Whether to divide by the true depth.

    Returns:
        A scalar in the precision of the arguments, single or better; NaN if no pixel is valid.

    Raises:
        TypeError: If ``mask`` does not hold booleans, or the others no real numbers.
        ValueError: If the shapes differ; for the relative error, if ``target`` is not positive at a pixel of ``mask``.

    Example:
        >>> from torch import tensor
        >>> from lightning_cost.metrics import depth_error
        >>> preds, target = tensor([[1.5, 3.0, 7.0]]), tensor([[1.0, 4.0, 0.0]])  # 0: unknown
        >>> depth_error(preds, target)
        tensor(0.7500)
        >>> depth_error(preds, target, relative=True)
        tensor(0.3750)
    """
    check_bool("relative", relative)
    pixels, sums = _error_sums(preds, target, mask)
    if relative:
        _check_divisible(target, mask)
    dtype = torch.promote_types(at_least_single(preds).dtype, at_least_single(target).dtype)
    return (sums["relative" if relative else "absolute"] / pixels).to(dtype)


class _DepthError(PixelMetric):
    is_differentiable = True
    higher_is_better = False

    absolute: Tensor
    relative: Tensor

    def __init__(self, average: Average = "pixels", **kwargs: Any) -> None:
        super().__init__(average, **kwargs)
        self._add_sum("absolute")
        self._add_sum("relative")

    def update(self, preds: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch."""
        pixels, sums = _error_sums(preds, target, mask)
        self._add_batch(pixels, **sums)


class AbsoluteDepthError(_DepthError):
    r"""Mean absolute error of predicted depth over the valid pixels, in the unit of the depth.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``preds`` (`torch.Tensor`): Predicted depth, of any shape, such as :math:`(B, 1, H, W)`
    - ``target`` (`torch.Tensor`): True depth, of the same shape
    - ``mask`` (`torch.Tensor`, optional): The pixels to count, booleans of the same shape. Default: those whose
      ``target`` is positive

    Predictions at other pixels do not matter, even if they are not finite. A batch without valid pixels is skipped, and
    ``forward`` returns NaN for it.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``absolute_depth_error`` (`torch.Tensor`): A scalar

    Args:
        average: ``"pixels"``: the mean over all valid pixels, as in LibMTL. ``"batch"``: the mean of each batch, then
            the mean over the batches, as in the public code of MTAN and of later methods. This depends on the batch
            size if batches differ in their number of valid pixels.
        **kwargs: Arguments of every metric, see `torchmetrics.Metric`.

    Raises:
        TypeError: In an update, if ``mask`` does not hold booleans.
        ValueError: If ``average`` is unknown; in an update, if the shapes differ.
        RuntimeError: In ``compute``, if there was no valid pixel yet.

    Example:
        >>> from torch import tensor
        >>> from lightning_cost.metrics import AbsoluteDepthError
        >>> metric = AbsoluteDepthError()
        >>> metric.update(tensor([1.5, 3.0, 7.0]), tensor([1.0, 4.0, 0.0]))
        >>> metric.update(tensor([5.0, 6.0, 7.0]), tensor([2.0, 0.0, 0.0]))
        >>> metric.compute()
        tensor(1.5000)
        >>> metric = AbsoluteDepthError(average="batch")
        >>> metric.update(tensor([1.5, 3.0, 7.0]), tensor([1.0, 4.0, 0.0]))
        >>> metric.update(tensor([5.0, 6.0, 7.0]), tensor([2.0, 0.0, 0.0]))
        >>> metric.compute()
        tensor(1.8750)
    """

    def compute(self) -> Tensor:
        """The error over all batches since the last reset."""
        return self._as_result(self._mean("absolute"))


class RelativeDepthError(_DepthError):
    r"""Mean relative error :math:`|\hat{d} - d| / d` of predicted depth over the valid pixels, as a fraction.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``preds`` (`torch.Tensor`): Predicted depth :math:`\hat{d}`, of any shape, such as :math:`(B, 1, H, W)`
    - ``target`` (`torch.Tensor`): True depth :math:`d`, of the same shape
    - ``mask`` (`torch.Tensor`, optional): The pixels to count, booleans of the same shape. Their ``target`` must be
      positive. Default: all pixels whose ``target`` is positive

    Predictions at other pixels do not matter, even if they are not finite. A batch without valid pixels is skipped, and
    ``forward`` returns NaN for it.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``relative_depth_error`` (`torch.Tensor`): A scalar

    Args:
        average: ``"pixels"`` or ``"batch"``, see `AbsoluteDepthError`.
        **kwargs: Arguments of every metric, see `torchmetrics.Metric`.

    Raises:
        TypeError: In an update, if ``mask`` does not hold booleans.
        ValueError: If ``average`` is unknown; in an update, if the shapes differ.
        RuntimeError: In ``compute``, if there was no valid pixel yet.

    Example:
        In a collection, both errors share their work:

        >>> from torch import tensor
        >>> from torchmetrics import MetricCollection
        >>> from lightning_cost.metrics import AbsoluteDepthError, RelativeDepthError
        >>> metrics = MetricCollection({"abs_err": AbsoluteDepthError(), "rel_err": RelativeDepthError()})
        >>> metrics(tensor([1.5, 3.0, 7.0]), tensor([1.0, 4.0, 0.0]))
        {'abs_err': tensor(0.7500), 'rel_err': tensor(0.3750)}
    """

    def update(self, preds: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch."""
        pixels, sums = _error_sums(preds, target, mask)
        _check_divisible(target, mask)
        self._add_batch(pixels, **sums)

    def compute(self) -> Tensor:
        """The error over all batches since the last reset."""
        return self._as_result(self._mean("relative"))


def _error_sums(preds: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    check_real("target", target)
    check_shapes(preds, target, mask, target.shape)
    valid = target > 0 if mask is None else mask
    # The zeros must replace the difference before `abs`. Later, the gradient of an invalid pixel would be NaN.
    error = torch.where(valid, at_least_single(preds) - at_least_single(target), 0).abs()
    dtype = state_dtype(error.device)
    # NaN shows where a collection shares the sums of a metric that does not divide.
    sums = {"absolute": error, "relative": error / torch.where(valid, target.where(target > 0, torch.nan), 1)}
    return valid.sum(), {name: values.sum(dtype=dtype) for name, values in sums.items()}


def _check_divisible(target: Tensor, mask: Tensor | None) -> None:
    bad = 0 if mask is None else int((mask & ~(target > 0)).sum())
    if bad:
        raise ValueError(
            f"`target` must be positive at all pixels of the `mask` for the relative error; {bad} are not. Leave them"
            " out of the mask, for example by `mask & (target > 0)`."
        )
