"""Sums stay in double precision, whatever the model is cast to and wherever it moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torchmetrics import Metric

from lightning_cost.metrics._precision import state_dtype
from tests.support.comparison_metrics import Factory, both, update_again
from tests.support.pixel_metrics import batches_of, both_averages, every_metric, updated


@both
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.bfloat16(),
        lambda module: module.half(),
        lambda module: module.float(),
        lambda module: module.double(),
    ],
)
def test_casting_the_model_rounds_no_average(
    factory: Factory, cast: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    expected = factory()
    update_again(expected)
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(1, 1), "metric": factory()})
    cast(model)
    metric: Any = model["metric"]
    update_again(metric)
    assert_close(metric.compute(), expected.compute(), rtol=0, atol=0)
    metric.reset()
    assert metric.sums.dtype == metric.counts.dtype == torch.float64


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


@both
def test_set_dtype_sets_the_precision_of_the_result(factory: Factory) -> None:
    def dtypes(metric: Metric) -> set[torch.dtype]:
        result = metric.compute()
        return {value.dtype for value in (result.values() if isinstance(result, Mapping) else [result])}

    assert dtypes(factory()) == {torch.float32}
    assert dtypes(factory().set_dtype(torch.float64)) == {torch.float64}
    assert dtypes(factory().set_dtype(torch.float16)) == {torch.float32}


@both
def test_the_state_moves_to_the_device_in_a_precision_that_it_has(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_double_on_meta(device: torch.device) -> torch.dtype:
        return torch.float32 if device.type == "meta" else torch.float64

    monkeypatch.setattr("lightning_cost.metrics._precision.state_dtype", no_double_on_meta)
    metric = factory().to("meta")
    assert metric.device.type == "meta"
    for state in (metric.sums, metric.counts, *metric._defaults.values()):
        assert (state.device.type, state.dtype) == ("meta", torch.float32)
    metric.reset()
    for state in (metric.sums, metric.counts):
        assert (state.device.type, state.dtype) == ("meta", torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both
def test_metrics_on_a_gpu_take_values_from_anywhere(factory: Factory) -> None:
    expected, metric = factory(), factory().to("cuda")
    update_again(expected)
    update_again(metric)
    result = metric.compute()
    for value in result.values() if isinstance(result, Mapping) else [result]:
        assert value.device.type == "cuda"
    assert_close(metric.to("cpu").compute(), expected.compute())


def test_devices_without_double_precision_get_single() -> None:
    assert state_dtype(torch.device("mps")) == torch.float32
    assert state_dtype(torch.device("cuda", 1)) == state_dtype(torch.device("cpu")) == torch.float64
