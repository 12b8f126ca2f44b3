"""Losses of dense predictions, over the pixels whose truth is known.

A batch without any such pixel has a loss of zero and a gradient of zero; as published it would be not a number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "depth_loss", "normals_loss", "segmentation_loss"]

IGNORED = -1
"""The label of pixels without a class."""


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, which is the negative log-likelihood of the log-softmax.

    Args:
        logits: (B, classes, H, W).
        labels: (B, H, W), -1 where there is none.
    """
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def depth_loss(prediction: Tensor, depth: Tensor) -> Tensor:
    """Mean absolute error.

    Args:
        prediction: (B, 1, H, W).
        depth: (B, 1, H, W), metric or inverse, positive where it is known.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(prediction, depth)
    return _mean((prediction - depth).abs(), depth > 0)


def normals_loss(prediction: Tensor, normals: Tensor) -> Tensor:
    """One minus the mean cosine.

    Args:
        prediction: Unit vectors (B, 3, H, W).
        normals: Unit vectors (B, 3, H, W), all zero where there is none.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(prediction, normals)
    return _mean(1 - (prediction * normals).sum(dim=1), (normals != 0).any(dim=1))


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, 0).sum() / valid.sum().clamp(min=1)


def _check_shapes(prediction: Tensor, truth: Tensor) -> None:
    # They would be broadcast, and the loss would be one of pairs of pixels.
    if prediction.shape != truth.shape:
        raise ValueError(
            f"The prediction and the truth must have the same shape, got {tuple(prediction.shape)} and"
            f" {tuple(truth.shape)}."
        )
