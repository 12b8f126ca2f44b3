"""Metrics over pixels, batches for them, and what NumPy computes of these batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, tensor
from torchmetrics import Metric

from lightning_cost.metrics import (
    AbsoluteDepthError,
    MeanNormalAngle,
    MedianNormalAngle,
    NormalsWithin,
    RelativeDepthError,
)

Batch = tuple[Tensor, Tensor]


Statistic = Callable[[NDArray[np.float64]], Any]


# What is measured, the statistic of the values of the pixels that it is, and how exact it is over all pixels.
METRICS: dict[str, tuple[str, Callable[..., Metric], Statistic, float]] = {
    "absolute": ("depth", AbsoluteDepthError, np.mean, 0),
    "relative": ("relative", RelativeDepthError, np.mean, 0),
    "mean": ("normals", MeanNormalAngle, np.mean, 0),
    "median": ("normals", MedianNormalAngle, np.median, 0.005),
    "within_11": ("normals", lambda **kwargs: NormalsWithin(11.25, **kwargs), lambda a: np.mean(a < 11.25), 0),
    "within_30": ("normals", lambda **kwargs: NormalsWithin(30, **kwargs), lambda a: np.mean(a < 30), 0),
}


every_metric = pytest.mark.parametrize("name", METRICS)


both_averages = pytest.mark.parametrize("average", ["pixels", "batch"])


def depth_batches() -> list[Batch]:
    """Of different sizes and numbers of valid pixels; in one batch there are none."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size, valid in ((2, 0.9), (1, 0.1), (2, 0.0), (3, 0.5)):
        target = 0.5 + 9 * torch.rand(size, 1, 6, 5, generator=generator)
        preds = target + torch.randn(target.shape, generator=generator)
        target[torch.rand(target.shape, generator=generator) >= valid] = 0
        batches.append((preds, target))
    return batches


def normal_batches() -> list[Batch]:
    """The same with normals, with small and large errors."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size, valid, error in ((2, 0.9, 0.1), (1, 0.1, 5.0), (2, 0.0, 1.0), (3, 0.5, 0.5)):
        target = torch.randn(size, 3, 6, 5, generator=generator)
        preds = target + error * torch.randn(target.shape, generator=generator)
        target = target / target.norm(dim=1, keepdim=True)
        # Components that add up to zero are no sign of a missing normal.
        target[0, :, 0, 0] = tensor([0.8, -0.2, -0.6]) / 1.04**0.5
        target[(torch.rand(size, 1, 6, 5, generator=generator) >= valid).expand_as(target)] = 0
        batches.append((preds, target))
    return batches


def batches_of(name: str) -> list[Batch]:
    return normal_batches() if METRICS[name][0] == "normals" else depth_batches()


def values_by_pixel(kind: str, preds: Tensor, target: Tensor) -> NDArray[np.float64]:
    """Errors or angles at the valid pixels, written another way."""
    p, t = preds.double().numpy(), target.double().numpy()
    if kind != "normals":
        p, t = p[t > 0], t[t > 0]
        return np.abs(p - t) / (t if kind == "relative" else 1)
    p, t = (np.moveaxis(x, 1, -1)[np.any(t != 0, axis=1)] for x in (p, t))
    cosines = np.sum(p * t, axis=1) / np.linalg.norm(p, axis=1) / np.linalg.norm(t, axis=1)
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


def expected(name: str, average: str, batches: Sequence[Batch]) -> float:
    kind, _, statistic, _ = METRICS[name]
    values = [by_pixel for batch in batches if len(by_pixel := values_by_pixel(kind, *batch))]
    if average == "pixels":
        return float(statistic(np.concatenate(values)))
    return float(np.mean([statistic(by_pixel) for by_pixel in values]))


def tolerance(name: str, average: str) -> float:
    return METRICS[name][3] if average == "pixels" else 0


def updated(name: str, average: str, batches: Sequence[Batch], **kwargs: Any) -> Metric:
    metric = METRICS[name][1](average=average, **kwargs)
    for preds, target in batches:
        metric.update(preds, target)
    return metric
