"""Δm% and the mean rank: against the paper's table, numbers worked by hand, and NumPy written another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor, tensor
from torch.testing import assert_close
from torchmetrics import MetricCollection
from torchmetrics.wrappers import Running

from lightning_cost.metrics import DeltaM, MeanRank, delta_m, mean_rank
from tests.support.comparison_metrics import BASELINES, DIRECTIONS

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


def cityscapes() -> tuple[Tensor, Tensor, Tensor]:
    """Values, printed mean ranks and printed Δm% of the 13 methods."""
    table = tensor(list(CITYSCAPES.values()), dtype=torch.float64)
    return table[:, :4], table[:, 4], table[:, 5]


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


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_mean_rank_metric_names_unknown_and_missing_methods() -> None:
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


def test_mean_rank_in_a_collection() -> None:
    directions = {"miou": True}
    collection = MetricCollection({"rank": MeanRank(["LS", "COST"], directions)}, prefix="test_")
    collection.update(method="LS", values={"miou": 44.0})
    collection.update(method="COST", values={"miou": 45.0})
    assert_close(collection.compute(), {"test_LS": tensor(2.0), "test_COST": tensor(1.0)})
