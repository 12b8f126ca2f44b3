"""Depth errors and normal angles against numpy, and what the recipes expect of torchmetrics' mIoU and accuracy."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, tensor
from torch.testing import assert_close
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_cost.metrics import (
    AbsoluteDepthError,
    MeanNormalAngle,
    MedianNormalAngle,
    NormalsWithin,
    RelativeDepthError,
    depth_error,
    normal_angles,
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
    """The same with normals, whose errors are between none and all."""
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


@every_metric
@both_averages
def test_metrics_equal_numpy(name: str, average: str) -> None:
    metric, batches = METRICS[name][1](average=average), batches_of(name)
    for _ in range(2):  # the second time after a reset
        forwarded = [metric(*batch).item() for batch in batches]
        single = [expected(name, average, [batch]) if i != 2 else np.nan for i, batch in enumerate(batches)]
        np.testing.assert_allclose(forwarded, single, rtol=1e-5, atol=tolerance(name, average))
        assert metric.compute().item() == pytest.approx(
            expected(name, average, batches), rel=1e-5, abs=tolerance(name, average)
        )
        metric.reset()


def test_the_averages_are_different_things() -> None:
    for name in METRICS:
        batches = batches_of(name)
        assert abs(expected(name, "pixels", batches) / expected(name, "batch", batches) - 1) > 0.02


@every_metric
@both_averages
@pytest.mark.parametrize("garbage", [1e9, float("nan"), float("inf"), float("-inf")])
def test_predictions_at_invalid_pixels_do_not_matter(name: str, average: str, garbage: float) -> None:
    batches = batches_of(name)
    spoilt = [
        (torch.where((target != 0).any(dim=1, keepdim=True), preds, garbage), target) for preds, target in batches
    ]
    assert_close(updated(name, average, spoilt).compute(), updated(name, average, batches).compute(), rtol=0, atol=0)


@every_metric
@both_averages
def test_a_mask_takes_the_place_of_the_rule(name: str, average: str) -> None:
    (preds, target), batch = batches_of(name)[0], batches_of(name)[3]
    valid = (target != 0).any(dim=1, keepdim=True)
    mask = valid & (torch.arange(5) < 3)
    chosen = mask[:, 0] if METRICS[name][0] == "normals" else mask
    metric = updated(name, average, [batch])
    metric.update(preds, target, chosen)
    masked = (preds, torch.where(mask, target, 0))
    assert_close(metric.compute(), updated(name, average, [batch, masked]).compute(), rtol=0, atol=0)


@every_metric
@both_averages
def test_a_prediction_that_is_no_number_shows_in_the_result(name: str, average: str) -> None:
    batches = batches_of(name)
    preds, target = batches[0]
    first = (target != 0).any(dim=1, keepdim=True).expand_as(preds).nonzero()[0]
    preds[tuple(first)] = float("nan")
    assert updated(name, average, batches).compute().isnan()


@every_metric
@both_averages
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_without_any_valid_pixel_there_is_nothing_to_compute(name: str, average: str) -> None:
    metric = METRICS[name][1](average=average)
    with pytest.raises(RuntimeError, match=f"`{type(metric).__name__}` has nothing to compute: no pixel"):
        metric.compute()
    empty, batch = batches_of(name)[2], batches_of(name)[0]
    metric.update(*empty)
    assert metric(*empty).isnan()
    with pytest.raises(RuntimeError, match="no pixel"):
        metric.compute()
    metric.update(*batch)
    assert_close(metric.compute(), updated(name, average, [batch]).compute())


@every_metric
@both_averages
def test_merged_and_copied_states_equal_one_process(name: str, average: str) -> None:
    batches = batches_of(name)
    whole = updated(name, average, batches).compute()
    one, other = updated(name, average, batches[:1]), updated(name, average, batches[1:])
    one.merge_state(pickle.loads(pickle.dumps(other)))
    assert_close(one.compute(), whole)


@every_metric
@both_averages
def test_synchronized_processes_equal_one_process(name: str, average: str) -> None:
    batches = batches_of(name)
    states = iter(updated(name, average, batches[1:]).metric_state.values())

    def gather(state: Tensor, group: Any) -> list[Tensor]:
        return [state, next(states)]

    local = updated(name, average, batches[:1], dist_sync_fn=gather, distributed_available_fn=lambda: True)
    assert_close(local.compute(), updated(name, average, batches).compute())


@every_metric
@both_averages
def test_casting_the_model_rounds_no_sum(name: str, average: str) -> None:
    batches = batches_of(name)
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(1, 1), "metric": updated(name, average, batches[:2])})
    model.bfloat16()
    metric: Any = model["metric"]
    with torch.inference_mode():
        metric.update(*batches[3])
        whole = metric.compute()
        metric.reset()
    assert_close(whole, updated(name, average, batches).compute(), rtol=0, atol=0)
    # A float32 stops counting at 16.8 million pixels.
    assert {state.dtype for state in metric.metric_state.values()} == {torch.float64}
    metric.update(*batches[0])
    assert_close(metric.compute(), updated(name, average, batches[:1]).compute(), rtol=0, atol=0)


@both_averages
@pytest.mark.parametrize("first", [0, 2])
def test_a_collection_of_metrics_equals_each_alone(average: str, first: int) -> None:
    # After the first batch a collection shares the states that are equal; without a valid pixel, all are zeros.
    batches = normal_batches()
    batches.insert(0, batches.pop(first))
    names = [name for name, (kind, *_) in METRICS.items() if kind == "normals"]
    collection = MetricCollection({name: METRICS[name][1](average=average) for name in names})
    collection.add_metrics({"other": MeanNormalAngle(average="batch" if average == "pixels" else "pixels")})
    for batch in batches:
        collection.update(*batch)
    computed = collection.compute()
    for name in names:
        assert_close(computed[name], updated(name, average, batches).compute())
    assert_close(computed["other"], updated("mean", collection["other"].average, batches).compute())
    assert len(collection.compute_groups) == 2


def test_depth_error_of_hand_computed_values_and_its_gradient() -> None:
    preds = tensor([[1.5, 3.0, float("nan")]], requires_grad=True)
    target = tensor([[1.0, 4.0, 0.0]])
    relative = depth_error(preds, target, relative=True)
    assert_close(relative.detach(), tensor((0.5 / 1 + 1 / 4) / 2))
    for value in (relative, RelativeDepthError(average="batch")(preds, target)):
        (gradient,) = torch.autograd.grad(value, preds)
        assert_close(gradient, tensor([[0.5, -0.125, 0.0]]))
    assert depth_error(tensor([3, 7]), tensor([1, 0])).dtype == torch.float32
    assert depth_error(preds, torch.zeros(1, 3)).isnan()


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
    ("build", "error", "message"),
    [
        (lambda: AbsoluteDepthError(average="image"), ValueError, r"`average` must be one of .*'batch'.*'image'"),
        (lambda: MeanNormalAngle("mean"), ValueError, r"`average` must be one of .* got 'mean'"),
        (lambda: NormalsWithin(0), ValueError, r"`degrees` must be a multiple of 0.01 above 0 .* got 0"),
        (lambda: NormalsWithin(181), ValueError, r"at most 180, got 181"),
        (lambda: NormalsWithin(11.255), ValueError, r"multiple of 0.01 .* got 11.255"),
        (lambda: NormalsWithin("30"), ValueError, r"`degrees` .* got '30'"),
        (lambda: depth_error(torch.ones(2, 1), torch.ones(2)), ValueError, r"same shape, got \(2, 1\) and \(2,\)"),
        (lambda: depth_error(torch.ones(2), torch.ones(2), torch.ones(2)), TypeError, r"`mask` must hold booleans"),
        (lambda: normal_angles(torch.ones(2, 4), torch.ones(2, 4)), ValueError, r"shape \(B, 3, ...\), got \(2, 4\)"),
        (
            lambda: normal_angles(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 3, 4).bool()),
            ValueError,
            r"`mask` must have shape \(2, 4\), one element per pixel, got \(2, 3, 4\)",
        ),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("absent", ["nowhere", "in the labels", "in both"])
def test_torchmetrics_has_the_scores_of_one_confusion_matrix(absent: str) -> None:
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
