"""Angles between normals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lightning_cost.metrics import MeanNormalAngle, MedianNormalAngle, NormalsWithin, normal_angles


def test_normal_angles_are_exact_at_both_ends() -> None:
    # The arc cosine of a float32 is a multiple of about 0.02 degrees near 0.
    degrees = torch.tensor([0.0, 0.001, 0.015, 45.0, 90.0, 179.999, 180.0], dtype=torch.float64)
    radians = degrees.deg2rad()
    preds = torch.stack([radians.sin(), torch.zeros(7), radians.cos()], dim=1)
    target = tensor([[0.0, 0.0, 1.0]]).expand(7, 3)
    np.testing.assert_allclose(normal_angles(5 * preds.float(), target), degrees, rtol=1e-5, atol=2e-5)
    assert_close(normal_angles(torch.zeros(1, 3), target[:1]), tensor([90.0]))


@pytest.mark.parametrize("offset", [0.0, 0.004, 0.009])
@pytest.mark.parametrize("pixels", [1, 2, 1001, 1002])
def test_the_median_of_all_pixels_is_as_exact_as_documented(offset: float, pixels: int) -> None:
    angles = np.concatenate([np.linspace(0, 1, pixels // 2), np.linspace(90, 180, pixels - pixels // 2)]) + offset
    radians = torch.from_numpy(np.radians(np.minimum(angles, 180)))
    preds = torch.stack([radians.sin(), torch.zeros(pixels), radians.cos()], dim=1)
    metric = MedianNormalAngle(average="pixels")
    for part in preds.split(300):
        metric.update(part, tensor([[0.0, 0.0, 1.0]]).expand(len(part), 3))
    assert metric.compute().item() == pytest.approx(np.median(np.minimum(angles, 180)), abs=0.005 + 1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MeanNormalAngle("mean"), r"`average` must be one of .* got 'mean'"),
        (lambda: NormalsWithin(0), r"`degrees` must be a multiple of 0.01 above 0 .* got 0"),
        (lambda: NormalsWithin(181), r"at most 180, got 181"),
        (lambda: NormalsWithin(11.255), r"multiple of 0.01 .* got 11.255"),
        (lambda: NormalsWithin("30"), r"`degrees` .* got '30'"),
        (lambda: normal_angles(torch.ones(2, 4), torch.ones(2, 4)), r"shape \(B, 3, ...\), got \(2, 4\)"),
        (
            lambda: normal_angles(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 3, 4).bool()),
            r"`mask` must have shape \(2, 4\), one element per pixel, got \(2, 3, 4\)",
        ),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
