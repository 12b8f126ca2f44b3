"""Metrics that compare methods, updated with a few values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torchmetrics import Metric

from lightning_cost.metrics import DeltaM, MeanRank

BASELINES = {"miou": 40.0, "abs_err": 0.5}


DIRECTIONS = {"miou": True, "abs_err": False}


Factory = Callable[..., Any]


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


both = pytest.mark.parametrize("factory", [updated_delta_m, updated_mean_rank])


def update_again(metric: Metric) -> None:
    values = {"miou": 43.0, "abs_err": 0.9}
    if isinstance(metric, MeanRank):
        metric.update("LS", values)
    else:
        metric.update(values)
