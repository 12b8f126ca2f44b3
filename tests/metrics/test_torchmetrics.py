"""What the recipes expect of the mIoU and the pixel accuracy of torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex


@pytest.mark.parametrize("absent", ["nowhere", "in the labels", "in both"])
def test_torchmetrics_computes_its_scores_from_one_confusion_matrix(absent: str) -> None:
    """IoU of each class that occurs in labels or predictions; the field's own code is not a number if one does not."""
    rng, classes = np.random.default_rng(0), 5
    iou, accuracy = (
        MulticlassJaccardIndex(classes, ignore_index=-1),
        MulticlassAccuracy(classes, average="micro", ignore_index=-1),
    )
    matrix = np.zeros((classes, classes))
    for size in (2, 3, 1):
        logits, labels = rng.normal(size=(size, classes, 4, 6)), rng.integers(-1, classes, (size, 4, 6))
        if absent != "nowhere":
            labels[labels == 3] = -1
        if absent == "in both":
            logits[:, 3] = -9
        iou.update(torch.from_numpy(logits), torch.from_numpy(labels))
        accuracy.update(torch.from_numpy(logits), torch.from_numpy(labels))
        chosen = logits.argmax(axis=1)
        np.add.at(matrix, (labels[labels >= 0], chosen[labels >= 0]), 1)
    hits = np.diag(matrix)
    with np.errstate(invalid="ignore"):
        by_class = hits / (matrix.sum(axis=0) + matrix.sum(axis=1) - hits)
    assert np.isnan(by_class).sum() == (absent == "in both")
    assert iou.compute().item() == pytest.approx(np.nanmean(by_class), rel=1e-5)
    assert accuracy.compute().item() == pytest.approx(hits.sum() / matrix.sum(), rel=1e-5)
