"""Losses of dense predictions, over the pixels whose truth is known.

A batch without any known pixel gives a loss of zero and a gradient of zero. Published code gives NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "LOSSES", "depth_loss", "normals_loss", "segmentation_loss"]

IGNORED = -1
"""The label of pixels without a class."""


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, classes, H, W) and labels (B, H, W), which are -1 where there is no class."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def depth_loss(prediction: Tensor, depth: Tensor) -> Tensor:
    """Mean absolute error of depth (B, 1, H, W), metric or inverse, which is positive where it is known.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(prediction, depth)
    return _mean((prediction - depth).abs(), depth > 0)


def normals_loss(prediction: Tensor, normals: Tensor) -> Tensor:
    """One minus the mean cosine of unit vectors (B, 3, H, W). Unknown normals are all zero.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(prediction, normals)
    return _mean(1 - (prediction * normals).sum(dim=1), (normals != 0).any(dim=1))


LOSSES = {"segmentation": segmentation_loss, "depth": depth_loss, "normals": normals_loss}
"""Task to its loss."""


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, 0).sum() / valid.sum().clamp(min=1)


def _check_shapes(prediction: Tensor, truth: Tensor) -> None:
    # Other shapes would be broadcast, and the loss would compare every pixel with every other.
    if prediction.shape != truth.shape:
        raise ValueError(
            f"The prediction and the truth must have the same shape, got {tuple(prediction.shape)} and"
            f" {tuple(truth.shape)}."
        )
