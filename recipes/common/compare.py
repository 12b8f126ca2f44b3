"""What is compared: methods, without and with a callback, and means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SINGLE_TASK", "Estimate", "Variant"]

SINGLE_TASK = "single-task"


@dataclass(frozen=True)
class Variant:
    """Names of a method and of a callback; the latter is empty without a callback."""

    method: str
    callback: str = ""

    @property
    def plain(self) -> Variant:
        """The method without a callback."""
        return Variant(self.method)

    def __str__(self) -> str:
        return f"{self.method} + {self.callback}" if self.callback else self.method


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error, which is NaN for a single seed."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Mean of the values, and their standard deviation divided by the square root of their number."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)
