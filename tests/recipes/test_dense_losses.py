"""Losses of dense predictions against numpy; pixels whose truth is unknown move nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from recipes.dense.losses import depth_loss, normals_loss, segmentation_loss

CLASSES = 5
Array = NDArray[np.float64]


def segmentation_by_hand(logits: Array, labels: Array) -> float:
    logits, labels = np.moveaxis(logits, 1, -1)[labels >= 0], labels[labels >= 0]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


def depth_by_hand(prediction: Array, depth: Array) -> float:
    return float(np.abs(prediction[depth > 0] - depth[depth > 0]).mean())


def normals_by_hand(prediction: Array, normals: Array) -> float:
    valid = np.abs(normals).max(axis=1) > 0
    return float(1 - np.einsum("bchw,bchw->bhw", prediction, normals)[valid].mean())


def segmentation_data(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, CLASSES, 4, 6, generator=generator)
    return logits, torch.randint(-1, CLASSES, (2, 4, 6), generator=generator)


def depth_data(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # Below zero it is as unknown as at zero.
    depth = torch.randn(2, 1, 4, 6, generator=generator)
    return torch.randn(2, 1, 4, 6, generator=generator), depth.where(depth > -0.5, 0)


def normals_data(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    prediction, normals = normalize(torch.randn(2, 2, 3, 4, 6, generator=generator), dim=2)
    normals[0, :, 0, 0] = torch.tensor([0.8, -0.2, -0.6])  # adds up to zero, and is a normal all the same
    return prediction, normals * (torch.rand(2, 1, 4, 6, generator=generator) > 0.3)


Case = tuple[
    Callable[[Tensor, Tensor], Tensor],
    Callable[[Array, Array], float],
    Callable[[torch.Generator], tuple[Tensor, Tensor]],
    float,
]
CASES: dict[str, Case] = {
    "segmentation": (segmentation_loss, segmentation_by_hand, segmentation_data, -1),
    "depth": (depth_loss, depth_by_hand, depth_data, 0),
    "normals": (normals_loss, normals_by_hand, normals_data, 0),
}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def unknown(truth: Tensor, prediction: Tensor) -> Tensor:
    """Where there is no truth, in the shape of the prediction."""
    if truth.ndim == 3:
        return (truth < 0).unsqueeze(1).expand_as(prediction)
    return ((truth == 0).all(dim=1, keepdim=True) | (truth < 0) & (truth.shape[1] == 1)).expand_as(prediction)


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_numpy(case: Case, seed: int) -> None:
    loss, by_hand, data, _ = case
    prediction, truth = data(torch.Generator().manual_seed(seed))
    assert unknown(truth, prediction).any()
    assert not unknown(truth, prediction).all()
    expected = by_hand(prediction.double().numpy(), truth.numpy())
    assert loss(prediction, truth).item() == pytest.approx(expected, rel=1e-5)


@every_loss
@pytest.mark.parametrize("garbage", [1e9, float("nan"), float("inf")])
def test_unknown_pixels_move_nothing(case: Case, garbage: float) -> None:
    loss, _, data, _ = case
    prediction, truth = data(torch.Generator().manual_seed(0))
    prediction.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(prediction, truth), prediction)
    known = ~unknown(truth, prediction)
    assert not gradient[~known].any()
    assert gradient[known].all()
    spoilt = prediction.detach().where(known, garbage).requires_grad_()
    value = loss(spoilt, truth)
    assert torch.equal(value, loss(prediction, truth))
    (gradient_of_spoilt,) = torch.autograd.grad(value, spoilt)
    assert torch.equal(gradient_of_spoilt[known], gradient[known])


@every_loss
def test_without_truth_loss_and_gradient_are_zero(case: Case) -> None:
    loss, _, data, missing = case
    prediction, truth = data(torch.Generator().manual_seed(0))
    prediction.requires_grad_()
    value = loss(prediction, torch.full_like(truth, missing))
    (gradient,) = torch.autograd.grad(value, prediction)
    assert value.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("loss", [depth_loss, normals_loss])
def test_shapes_that_would_be_broadcast_are_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"same shape, got \(2, 3, 4, 4\) and \(2, 4, 4\)"):
        loss(torch.ones(2, 3, 4, 4), torch.ones(2, 4, 4))
