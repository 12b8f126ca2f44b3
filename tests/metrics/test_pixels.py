"""Averages over pixels or over batches, for every metric of depths and of normals, against NumPy."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchmetrics import MetricCollection

from lightning_cost.metrics import MeanNormalAngle
from tests.support.pixel_metrics import (
    METRICS,
    batches_of,
    both_averages,
    every_metric,
    expected,
    normal_batches,
    tolerance,
    updated,
)


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
def test_a_mask_replaces_the_rule_for_valid_pixels(name: str, average: str) -> None:
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
def test_a_nan_prediction_makes_the_result_nan(name: str, average: str) -> None:
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
