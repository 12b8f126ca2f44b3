"""Averages of named values, for the metrics that compare methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_cost.metrics._precision import PreciseMetric, check_real

__all__ = ["NamedAverages", "check_names", "check_number"]


class NamedAverages(PreciseMetric):
    """Averages named metric values: one row per method that is evaluated, one column per metric.

    Args:
        rows: The number of rows.
        higher_is_better: For each metric, by name, whether a higher value is better.
        **kwargs: Arguments of every metric, see `torchmetrics.Metric`.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, rows: int, higher_is_better: Mapping[str, bool], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(higher_is_better, Mapping) or not higher_is_better:
            raise TypeError(f"`higher_is_better` must map names of metrics to booleans, got {higher_is_better!r}.")
        for name, higher in higher_is_better.items():
            if not isinstance(name, str):
                raise TypeError(
                    f"`higher_is_better` must have names of metrics as keys, which are strings, got {name!r}."
                )
            if not isinstance(higher, bool):
                raise TypeError(f"`higher_is_better[{name!r}]` must be a boolean, got {higher!r}.")
        # Sorted, so that states of two copies can be added even if their mappings have another order.
        self.names = tuple(sorted(higher_is_better))
        # Not `higher_is_better`: every torchmetrics class has a constant of that name, which is about the result.
        self._directions = tuple(higher_is_better[name] for name in self.names)
        self._add_sum("sums", rows, len(self.names))
        self._add_sum("counts", rows)

    def _add(self, row: int, values: Mapping[str, Tensor | float]) -> None:
        """Add one evaluation of a row. If a value is refused, nothing changes."""
        if not isinstance(values, Mapping):
            raise TypeError(f"`values` must map each metric's name to its value, got {type(values).__name__}.")
        check_names("values", values, self.names)
        for name in self.names:
            check_number(f"values[{name!r}]", values[name])
        dtype, device = self.sums.dtype, self.sums.device
        evaluation = torch.stack(
            [torch.as_tensor(values[k], dtype=dtype, device=device).reshape(()) for k in self.names]
        )
        bad = {name: x for name, x in zip(self.names, evaluation.tolist(), strict=True) if not math.isfinite(x)}
        if bad:
            raise ValueError(f"`values` must be finite, got {bad}.")
        selected = torch.arange(len(self.counts), device=device) == row
        self.sums = self.sums + selected.unsqueeze(1) * evaluation
        self.counts = self.counts + selected

    def _averages(self) -> Tensor:
        return self.sums / self.counts.unsqueeze(1)


def check_names(argument: str, given: Iterable[str], expected: Sequence[str]) -> None:
    """Refuse names that are missing or unknown."""
    given = set(given)
    missing, unknown = sorted(set(expected) - given), sorted(given - set(expected), key=str)
    if missing or unknown:
        raise ValueError(
            f"`{argument}` must have the metrics {list(expected)} of `higher_is_better`: "
            f"missing {missing}, unknown {unknown}."
        )


def check_number(argument: str, value: object) -> None:
    """Refuse a value that is neither a number nor a tensor with one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"`{argument}` must have one element, got a tensor of shape {tuple(value.shape)}.")
        check_real(argument, value)
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{argument}` must be a number or a tensor with one element, got {value!r}.")
