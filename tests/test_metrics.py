"""Δm% and the mean rank: against the paper's table, numbers worked by hand, and numpy written another way."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor, tensor
from torch.nn.functional import mse_loss
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.wrappers import Running

from lightning_cost.metrics import DeltaM, MeanRank, delta_m, mean_rank
from lightning_cost.metrics._precision import state_dtype

# Table 1 of the paper (CityScapes): mIoU, pixel accuracy, absolute error, relative error, printed MR, printed Δm%.
CITYSCAPES_BASELINES = [74.01, 93.16, 0.0125, 27.77]
CITYSCAPES_DIRECTIONS = [True, True, False, False]
CITYSCAPES = {
    "LS": (75.18, 93.49, 0.0155, 46.77, 8.25, 22.60),
    "RLW": (74.57, 93.41, 0.0158, 47.79, 11.00, 24.37),
    "DWA": (75.24, 93.52, 0.0160, 44.37, 8.25, 21.43),
    "Uncertainty": (72.02, 92.85, 0.0140, 30.13, 7.50, 5.88),
    "MGDA": (68.84, 91.54, 0.0309, 33.50, 11.00, 44.14),
    "GradDrop": (75.27, 93.53, 0.0157, 47.54, 7.75, 23.67),
    "PCGrad": (75.13, 93.48, 0.0154, 42.07, 8.50, 18.21),
    "CAGrad": (75.16, 93.48, 0.0141, 37.60, 7.50, 11.58),
    "IMTL": (75.33, 93.49, 0.0135, 38.41, 5.75, 11.04),
    "Nash-MTL": (75.41, 93.66, 0.0129, 35.02, 3.00, 6.82),
    "FAMO": (74.54, 93.29, 0.0145, 32.59, 8.25, 8.13),
    "FairGrad": (75.72, 93.68, 0.0134, 32.25, 2.25, 5.18),
    "COST": (75.73, 93.53, 0.0133, 31.53, 2.00, 4.30),
}

BASELINES = {"miou": 40.0, "abs_err": 0.5}
DIRECTIONS = {"miou": True, "abs_err": False}


def cityscapes() -> tuple[Tensor, Tensor, Tensor]:
    """Values, printed mean ranks and printed Δm% of the 13 methods."""
    table = tensor(list(CITYSCAPES.values()), dtype=torch.float64)
    return table[:, :4], table[:, 4], table[:, 5]


# ---------------------------------------------------------------------------------------------------------- functional


def test_delta_m_of_hand_computed_values() -> None:
    # 10% better, 10% worse, 50% worse, each in its own direction.
    values, baselines = tensor([44.0, 36.0, 0.75]), tensor([40.0, 40.0, 0.5])
    assert_close(delta_m(values, baselines, [True, True, False]), tensor((-10.0 + 10.0 + 50.0) / 3))
    assert_close(delta_m(values, baselines, [False, False, True]), tensor((10.0 - 10.0 - 50.0) / 3))


def test_delta_m_reproduces_the_paper() -> None:
    values, _, printed = cityscapes()
    # The table's metrics are rounded: half a unit in the last place of 0.0125 alone is 0.1 points of Δm%.
    assert_close(delta_m(values, CITYSCAPES_BASELINES, CITYSCAPES_DIRECTIONS), printed, atol=0.11, rtol=0)


def test_mean_rank_reproduces_the_paper() -> None:
    values, printed, _ = cityscapes()
    # Three pairs tie in the rounded pixel accuracy alone. Their printed mean ranks say which was the lower one.
    for name in ("IMTL", "GradDrop", "CAGrad"):
        values[list(CITYSCAPES).index(name), 1] -= 0.001
    assert_close(mean_rank(values, CITYSCAPES_DIRECTIONS), printed, atol=0, rtol=0)


def test_mean_rank_of_hand_computed_ties() -> None:
    values = tensor([[0.9, 3.0], [0.9, 1.0], [0.5, 1.0], [0.9, 1.0]])
    # First metric, higher is better: 2, 2, 4, 2. Second, lower is better: 4, 2, 2, 2.
    assert_close(mean_rank(values, [True, False]), tensor([3.0, 2.0, 3.0, 2.0]))


positive_floats = st.floats(1e-3, 1e3)


@given(data=st.data(), shape=hnp.array_shapes(min_dims=1, max_dims=3, max_side=5))
def test_delta_m_equals_numpy(data: st.DataObject, shape: tuple[int, ...]) -> None:
    values = data.draw(hnp.arrays(np.float64, shape, elements=st.floats(-1e3, 1e3)))
    baselines = data.draw(hnp.arrays(np.float64, shape[-1:], elements=positive_floats))
    higher = data.draw(hnp.arrays(np.bool_, shape[-1:]))
    percentages = ((-1.0) ** higher) * (100 * values / baselines - 100)
    result = delta_m(tensor(values), tensor(baselines), tensor(higher))
    np.testing.assert_allclose(result.numpy(), percentages.mean(axis=-1), rtol=1e-9, atol=1e-9)


def rank_by_sorting(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average of the first and the last position that the value takes among the sorted ones, counted from 1."""
    ordered = np.sort(costs)
    return (np.searchsorted(ordered, costs, "left") + 1 + np.searchsorted(ordered, costs, "right")) / 2


@given(data=st.data(), shape=hnp.array_shapes(min_dims=2, max_dims=2, max_side=7))
def test_mean_rank_equals_ranks_by_sorting(data: st.DataObject, shape: tuple[int, int]) -> None:
    values = data.draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([-1.5, 0.0, 0.1, 2.0])))  # many ties
    higher = data.draw(hnp.arrays(np.bool_, shape[1]))
    expected = np.stack([rank_by_sorting(-v if up else v) for v, up in zip(values.T, higher, strict=True)]).mean(axis=0)
    result = mean_rank(tensor(values), tensor(higher))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12)
    assert result.mean().item() == pytest.approx((shape[0] + 1) / 2)  # sharing keeps the sum of the ranks


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_functions_compute_in_single_precision_or_better(given_dtype: torch.dtype, expected: torch.dtype) -> None:
    values = tensor([[3, 2], [1, 4]], dtype=given_dtype)
    assert_close(delta_m(values, [2.0, 4.0], [False, True]), tensor([50.0, -25.0], dtype=expected))
    assert_close(mean_rank(values, [False, True]), tensor([2.0, 1.0], dtype=expected))


@pytest.mark.parametrize(
    ("values", "baselines", "higher", "error", "message"),
    [
        (tensor(1.0), [1.0], [True], ValueError, r"`values` must have shape"),
        (torch.zeros(0), [], [], ValueError, r"`values` must have shape"),
        (tensor([1.0, float("nan")]), [1.0, 1.0], [True, True], ValueError, r"`values` .* got nan at index \[1\]"),
        (tensor([1.0]), [1.0, 1.0], [True], ValueError, r"`baselines` .* shape \(1,\), got \(2,\)"),
        (tensor([1.0, 1.0]), [1.0, float("inf")], [True, True], ValueError, r"`baselines` .* got inf at index \[1\]"),
        (tensor([1.0, 1.0]), [1.0, 0.0], [True, True], ValueError, r"`baselines` must be positive.*\[1.0, 0.0\]"),
        (tensor([1.0, 1.0]), [1.0, -2.0], [True, True], ValueError, r"`baselines` must be positive.*\[1.0, -2.0\]"),
        (tensor([1.0, 1.0]), [1.0, 1.0], [True], ValueError, r"`higher_is_better` .* shape \(2,\), got \(1,\)"),
        (tensor([1.0, 1.0]), [1.0, 1.0], [1, 0], TypeError, r"`higher_is_better` must hold booleans, got \[1, 0\]"),
    ],
)
def test_delta_m_refuses(
    values: Tensor, baselines: list[float], higher: list[bool], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        delta_m(values, baselines, higher)


@pytest.mark.parametrize(
    ("values", "higher", "error", "message"),
    [
        (torch.ones(2), [True, True], ValueError, r"`values` must have shape \(methods, metrics\).*got \(2,\)"),
        (torch.ones(0, 2), [True, True], ValueError, r"at least one of each, got \(0, 2\)"),
        (tensor([[1.0], [float("nan")]]), [True], ValueError, r"`values` .* got nan at index \[1, 0\]"),
        (torch.ones(2, 2), [True], ValueError, r"`higher_is_better` .* shape \(2,\), got \(1,\)"),
        (torch.ones(2, 2), tensor([0.0, 1.0]), TypeError, r"`higher_is_better` must hold booleans"),
    ],
)
def test_mean_rank_refuses(values: Tensor, higher: Tensor | list[bool], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mean_rank(values, higher)


# -------------------------------------------------------------------------------------------------------------- DeltaM


def test_delta_m_metric_averages_evaluations_and_returns_the_batch_value_from_forward() -> None:
    metric = DeltaM(BASELINES, DIRECTIONS)
    # Mappings are read by name, in whatever order they come.
    assert_close(metric({"abs_err": 0.6, "miou": tensor(44.0)}), tensor((-10.0 + 20.0) / 2))
    metric.update({"miou": 40, "abs_err": tensor([0.7])})
    assert_close(metric.compute(), tensor((-5.0 + 30.0) / 2))
    metric.reset()
    metric.update({"miou": 36.0, "abs_err": 0.5})
    assert_close(metric.compute(), tensor(5.0))


@settings(max_examples=30)
@given(st.lists(st.tuples(positive_floats, positive_floats), min_size=1, max_size=6))
def test_delta_m_metric_equals_numpy(epochs: list[tuple[float, float]]) -> None:
    metric = DeltaM(BASELINES, DIRECTIONS).set_dtype(torch.float64)
    batch_values = [metric({"miou": miou, "abs_err": abs_err}) for miou, abs_err in epochs]
    miou, abs_err = np.mean(epochs, axis=0)
    expected = 100 * ((40.0 - miou) / 40.0 + (abs_err - 0.5) / 0.5) / 2
    assert metric.compute().item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    # Eq. 14 is linear in the metrics.
    assert torch.stack(batch_values).mean().item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_running_delta_m_averages_the_last_evaluations() -> None:
    metric = Running(DeltaM(BASELINES, DIRECTIONS), window=3)
    metric.update({"miou": 40.0, "abs_err": 0.6})
    assert_close(metric.compute(), tensor(10.0))
    for abs_err in (100.0, 0.5, 0.6, 1.0):
        metric.update({"miou": 40.0, "abs_err": abs_err})
    assert_close(metric.compute(), tensor((0.0 + 10.0 + 50.0) / 3))


def test_delta_m_metric_is_differentiable() -> None:
    miou, abs_err = tensor(44.0, requires_grad=True), tensor(0.6, requires_grad=True)
    metric = DeltaM(BASELINES, DIRECTIONS)
    value = metric({"miou": miou, "abs_err": abs_err})
    value.backward()
    assert_close(miou.grad, tensor(-100.0 / (2 * 40.0)))
    assert_close(abs_err.grad, tensor(100.0 / (2 * 0.5)))
    assert not metric.sums.requires_grad  # evaluations of an epoch must not keep their graphs alive


def test_delta_m_metric_says_that_lower_is_better() -> None:
    metric = DeltaM({"miou": 40.0}, {"miou": True})
    assert metric.higher_is_better is False


@pytest.mark.parametrize(
    ("baselines", "higher", "error", "message"),
    [
        ([40.0], {"miou": True}, TypeError, r"`baselines` must map.*\[40.0\]"),
        ({}, {}, TypeError, r"`higher_is_better` must map"),
        ({"miou": 40.0}, ["miou"], TypeError, r"`higher_is_better` must map.*\['miou'\]"),
        ({"miou": 40.0}, {"miou": 1}, TypeError, r"`higher_is_better\['miou'\]` must be a boolean, got 1"),
        ({"miou": 40.0}, {"acc": True}, ValueError, r"`baselines` .* missing \['acc'\], unknown \['miou'\]"),
        ({"miou": 0.0}, {"miou": True}, ValueError, r"`baselines\['miou'\]` must be positive.* got 0.0"),
        ({"miou": -1.0}, {"miou": True}, ValueError, r"`baselines\['miou'\]` must be positive.* got -1.0"),
        ({"miou": float("nan")}, {"miou": True}, ValueError, r"`baselines\['miou'\]` .* finite.* got nan"),
        ({"miou": "40"}, {"miou": True}, TypeError, r"`baselines\['miou'\]` must be a number.*'40'"),
        ({"miou": torch.ones(2)}, {"miou": True}, TypeError, r"`baselines\['miou'\]` must have one element.*\(2,\)"),
    ],
)
def test_delta_m_metric_refuses_to_be_built(baselines: Any, higher: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeltaM(baselines, higher)


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


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_delta_m_metric_has_no_value_before_an_update() -> None:
    metric = DeltaM(BASELINES, DIRECTIONS)
    with pytest.raises(RuntimeError, match="call `update`"):
        metric.compute()
    metric.update({"miou": 44.0, "abs_err": 0.5})
    metric.reset()
    with pytest.raises(RuntimeError, match="call `update`"):
        metric.compute()


# ------------------------------------------------------------------------------------------------------------ MeanRank


def test_mean_rank_metric_averages_seeds_before_ranking() -> None:
    metric = MeanRank(["LS", "MGDA", "COST"], DIRECTIONS)
    metric.update("COST", {"abs_err": 0.5, "miou": tensor(41.0)})
    metric.update("LS", {"miou": 30.0, "abs_err": 0.9})
    metric.update("MGDA", {"miou": 40.0, "abs_err": 0.5})
    metric.update("LS", {"miou": 60.0, "abs_err": 0.5})  # means 45.0 and 0.7
    result = metric.compute()
    assert list(result) == ["LS", "MGDA", "COST"]
    assert_close(result, {"LS": tensor(2.0), "MGDA": tensor(2.25), "COST": tensor(1.75)})


def test_mean_rank_metric_equals_the_function() -> None:
    values, _, _ = cityscapes()
    names = ["b_miou", "d_acc", "a_abs", "c_rel"]  # not in sorted order
    metric = MeanRank(list(CITYSCAPES), dict(zip(names, CITYSCAPES_DIRECTIONS, strict=True)))
    for method, row in zip(CITYSCAPES, values, strict=True):
        metric.update(method, dict(zip(names, row, strict=True)))
    expected = mean_rank(values, CITYSCAPES_DIRECTIONS).float()
    assert_close(metric.compute(), dict(zip(CITYSCAPES, expected, strict=True)))


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ("LS", TypeError, r"`methods` must be a sequence of names.*'LS'"),
        ([], TypeError, r"`methods` must be a sequence of names"),
        ({"LS": 1}, TypeError, r"`methods` must be a sequence of names"),
        (["LS", "COST", "LS"], ValueError, r"`methods` must not name a method twice.*\['LS', 'COST', 'LS'\]"),
    ],
)
def test_mean_rank_metric_refuses_methods(methods: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MeanRank(methods, DIRECTIONS)


@pytest.mark.parametrize(("values", "error", "message"), BAD_VALUES)
def test_mean_rank_metric_refuses_an_update(values: Any, error: type[Exception], message: str) -> None:
    metric = MeanRank(["LS", "COST"], DIRECTIONS)
    with pytest.raises(error, match=message):
        metric.update("LS", values)
    assert not metric.counts.any()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_mean_rank_metric_names_the_methods_that_it_does_not_know_or_misses() -> None:
    metric = MeanRank(["LS", "MGDA", "COST"], DIRECTIONS)
    with pytest.raises(ValueError, match=r"`method` must be one of \['LS', 'MGDA', 'COST'\], got 'PCGrad'"):
        metric.update("PCGrad", {"miou": 44.0, "abs_err": 0.5})
    with pytest.raises(RuntimeError, match=r"\['LS', 'MGDA', 'COST'\]"):
        metric.compute()
    metric.update("MGDA", {"miou": 44.0, "abs_err": 0.5})
    with pytest.raises(RuntimeError, match=r"\['LS', 'COST'\]"):
        metric.compute()


def test_mean_rank_metric_refuses_forward_and_keeps_its_state() -> None:
    metric = MeanRank(["LS"], DIRECTIONS)
    metric.update("LS", {"miou": 44.0, "abs_err": 0.5})
    with pytest.raises(NotImplementedError, match="`update`"):
        metric("LS", {"miou": 44.0, "abs_err": 0.5})
    assert_close(metric.counts, tensor([1.0], dtype=torch.float64))


# ------------------------------------------------------------------------------------- what every torchmetric has to do


def updated_delta_m(**kwargs: Any) -> Metric:
    metric = DeltaM(BASELINES, DIRECTIONS, **kwargs)
    metric.update({"miou": 44.0, "abs_err": 0.6})
    metric.update({"miou": 40.0, "abs_err": 0.7})
    return metric


def updated_mean_rank(**kwargs: Any) -> Metric:
    metric = MeanRank(["LS", "COST"], DIRECTIONS, **kwargs)
    metric.update("LS", {"miou": 44.0, "abs_err": 0.6})
    metric.update("COST", {"miou": 40.0, "abs_err": 0.5})
    metric.update("COST", {"miou": 50.0, "abs_err": 0.8})
    return metric


Factory = Callable[..., Any]
both = pytest.mark.parametrize("factory", [updated_delta_m, updated_mean_rank])


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


def update_again(metric: Metric) -> None:
    values = {"miou": 43.0, "abs_err": 0.9}
    if isinstance(metric, MeanRank):
        metric.update("LS", values)
    else:
        metric.update(values)


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


def test_mean_rank_in_a_collection() -> None:
    directions = {"miou": True}
    collection = MetricCollection({"rank": MeanRank(["LS", "COST"], directions)}, prefix="test_")
    collection.update(method="LS", values={"miou": 44.0})
    collection.update(method="COST", values={"miou": 45.0})
    assert_close(collection.compute(), {"test_LS": tensor(2.0), "test_COST": tensor(1.0)})


class TwoRegressions(L.LightningModule):
    """Logs Δm% of its two validation errors, by epoch and over the last two epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.errors = torch.nn.ModuleDict({"left": MeanMetric(), "right": MeanMetric()})
        baselines, directions = {"left": 0.5, "right": 2.0}, {"left": False, "right": False}
        self.delta_m = DeltaM(baselines, directions)
        self.recent = Running(DeltaM(baselines, directions), window=2)
        self.epochs: list[tuple[float, float]] = []
        self.logged: list[tuple[float, float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return mse_loss(self.layer(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        squared = (self.layer(batch[0]) - batch[1]).square()
        self.errors["left"].update(squared[:, 0])
        self.errors["right"].update(squared[:, 1])

    def on_validation_epoch_end(self) -> None:
        values = {name: error.compute() for name, error in self.errors.items()}
        for error in self.errors.values():
            error.reset()
        self.delta_m.update(values)
        self.log("val/delta_m", self.delta_m)
        if not self.trainer.sanity_checking:
            self.recent.update(values)
            self.log("val/delta_m_recent", self.recent.compute())
            self.epochs.append((values["left"].item(), values["right"].item()))

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.logged.append((metrics["val/delta_m"].item(), metrics["val/delta_m_recent"].item()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_trainer_logs_delta_m_of_each_epoch(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, 12, 2, generator=generator)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=5)
    model = TwoRegressions()
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader, loader)

    by_epoch = [100 * ((left - 0.5) / 0.5 + (right - 2.0) / 2.0) / 2 for left, right in model.epochs]
    assert len(set(by_epoch)) == 3  # the model has moved, so the epochs can be told apart
    recent = [by_epoch[0], sum(by_epoch[:2]) / 2, sum(by_epoch[1:]) / 2]
    # The sanity check's evaluation is in neither, nor is any epoch in the next one's value.
    np.testing.assert_allclose(model.logged, list(zip(by_epoch, recent, strict=True)), rtol=1e-5, atol=1e-5)
