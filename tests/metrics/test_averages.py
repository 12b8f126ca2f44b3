"""Averages of named values: their state, and the values that they refuse."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close
from torchmetrics import Metric, MetricCollection

from lightning_cost.metrics import DeltaM, MeanRank
from tests.support.comparison_metrics import BASELINES, DIRECTIONS, Factory, both, update_again, updated_delta_m

BAD_VALUES = [
    (tensor([40.0, 0.5]), TypeError, r"`values` must map each metric's name.*Tensor"),
    ({"miou": 40.0}, ValueError, r"`values` .* missing \['abs_err'\], unknown \[\]"),
    ({"miou": 40.0, "abs_err": 0.5, "rel": 1.0}, ValueError, r"`values` .* missing \[\], unknown \['rel'\]"),
    ({"miou": float("nan"), "abs_err": 0.5}, ValueError, r"`values` must be finite, got \{'miou': nan\}"),
    ({"miou": 40.0, "abs_err": tensor(-torch.inf)}, ValueError, r"`values` must be finite, got \{'abs_err': -inf\}"),
    ({"miou": "40", "abs_err": 0.5}, TypeError, r"`values\['miou'\]` must be a number.*'40'"),
    ({"miou": torch.ones(3), "abs_err": 0.5}, TypeError, r"`values\['miou'\]` must have one element.*\(3,\)"),
]


@pytest.mark.parametrize(("values", "error", "message"), BAD_VALUES)
def test_delta_m_metric_refuses_an_update_and_keeps_its_state(
    values: Any, error: type[Exception], message: str
) -> None:
    metric = DeltaM(BASELINES, DIRECTIONS)
    metric.update({"miou": 44.0, "abs_err": 0.5})
    with pytest.raises(error, match=message):
        metric.update(values)
    assert_close(metric.compute(), tensor(-5.0))


@pytest.mark.parametrize(("values", "error", "message"), BAD_VALUES)
def test_mean_rank_metric_refuses_an_update(values: Any, error: type[Exception], message: str) -> None:
    metric = MeanRank(["LS", "COST"], DIRECTIONS)
    with pytest.raises(error, match=message):
        metric.update("LS", values)
    assert not metric.counts.any()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_delta_m_metric_has_no_value_before_an_update() -> None:
    metric = DeltaM(BASELINES, DIRECTIONS)
    with pytest.raises(RuntimeError, match="call `update`"):
        metric.compute()
    metric.update({"miou": 44.0, "abs_err": 0.5})
    metric.reset()
    with pytest.raises(RuntimeError, match="call `update`"):
        metric.compute()


@both
@pytest.mark.parametrize("copy", [deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_copies_go_on_independently(factory: Factory, copy: Callable[[Metric], Metric]) -> None:
    original = factory()
    before = original.compute()
    twin = copy(original)
    assert_close(twin.compute(), before)
    update_again(twin)
    update_again(twin)
    assert_close(original.compute(), before)
    assert twin.counts.sum() == original.counts.sum() + 2


@both
def test_merged_states_equal_one_process(factory: Factory) -> None:
    one, other, whole = factory(), factory(), factory()
    one.reset()
    update_again(one)
    update_again(whole)
    one.merge_state(other)
    assert_close(one.compute(), whole.compute())


@both
def test_synchronized_processes_equal_one_process(factory: Factory) -> None:
    other, whole = factory(), factory()
    states: Iterator[Tensor] = iter(other.metric_state.values())

    def gather(state: Tensor, group: Any) -> list[Tensor]:
        return [state, next(states)]

    local = factory(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    local.reset()
    update_again(local)
    update_again(whole)
    assert_close(local.compute(), whole.compute())
    assert local.counts.sum() == 1  # back to its own evaluations afterwards


def test_copies_built_from_differently_ordered_mappings_merge() -> None:
    one = DeltaM(BASELINES, DIRECTIONS)
    other = DeltaM(dict(reversed(BASELINES.items())), dict(reversed(DIRECTIONS.items())))
    one.update({"miou": 44.0, "abs_err": 0.6})
    other.update({"miou": 40.0, "abs_err": 0.7})
    one.merge_state(other)
    assert_close(one.compute(), updated_delta_m().compute())


@both
def test_state_dict_holds_the_state_if_asked_to(factory: Factory) -> None:
    metric, restored = factory(), factory()
    assert not metric.state_dict()
    metric.persistent(True)
    restored.reset()
    restored.load_state_dict(metric.state_dict())
    update_again(restored)
    update_again(metric)
    assert_close(restored.compute(), metric.compute())


@both
def test_a_reset_in_inference_mode_does_not_forbid_later_updates(factory: Factory) -> None:
    metric = factory()
    with torch.inference_mode():
        metric.reset()
    update_again(metric)
    assert metric.counts.sum() == 1


def test_metrics_of_one_collection_keep_their_own_baselines() -> None:
    # After the first update the collection shares the states of metrics whose states are equal.
    collection = MetricCollection(
        {
            "single": DeltaM(BASELINES, DIRECTIONS),
            "ls": DeltaM({"miou": 50.0, "abs_err": 1.0}, DIRECTIONS),
        }
    )
    first = collection({"miou": 44.0, "abs_err": 0.6})
    assert_close(first, {"single": tensor(5.0), "ls": tensor((12.0 - 40.0) / 2)})
    collection.update({"miou": 40.0, "abs_err": 0.6})
    expected = {"single": tensor((-5.0 + 20.0) / 2), "ls": tensor((16.0 - 40.0) / 2)}
    assert_close(collection.compute(), expected)
    assert_close(collection.clone().compute(), expected)
