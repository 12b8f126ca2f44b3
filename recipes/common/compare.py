"""Methods side by side: means and errors over seeds, paired changes, Δm% and ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_cost.metrics import DeltaM, MeanRank
from recipes.common.training import Measured

__all__ = ["SINGLE_TASK", "Estimate", "Run", "Summary", "Variant", "baselines", "compare", "delta_m_of"]

SINGLE_TASK = "single-task"


@dataclass(frozen=True)
class Variant:
    """A method, without a callback or with one.

    Attributes:
        method: Name of the method.
        callback: Name of the callback's settings; empty without a callback.
    """

    method: str
    callback: str = ""

    @property
    def plain(self) -> Variant:
        """The method without a callback."""
        return Variant(self.method)

    def __str__(self) -> str:
        return f"{self.method} + {self.callback}" if self.callback else self.method


@dataclass(frozen=True)
class Run:
    """One run of a variant. A single-task run has the metrics of its one task."""

    variant: Variant
    seed: int
    measured: Measured


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error, which is not a number for a single seed."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Mean of the values, and their standard deviation divided by the square root of their number."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)


@dataclass(frozen=True)
class Summary:
    """One variant over its seeds.

    Attributes:
        variant: The variant.
        metrics: Test metrics.
        delta_m: Δm% against the baselines, whose own error is not in it.
        change: Δm% with the callback minus Δm% without, seed by seed; None without one.
        mean_rank: Mean rank among the variants, the baselines left out.
        conflict_share: Share of the steps looked at, of all seeds, that conflict.
        tried: Teleports tried, in all seeds.
        accepted: Teleports accepted, in all seeds.
        seconds: Mean wall-clock time of a run.
    """

    variant: Variant
    metrics: dict[str, Estimate]
    delta_m: Estimate
    change: Estimate | None
    mean_rank: float
    conflict_share: float
    tried: int
    accepted: int
    seconds: float


def baselines(
    runs: Iterable[Run], metrics: Callable[[Measured], Mapping[str, float]] = lambda measured: measured.test
) -> dict[str, Estimate]:
    """Metrics of the single-task runs, each over its seeds.

    Args:
        runs: Runs, those with several tasks among them.
        metrics: Which metrics of a run; the test metrics if not given.
    """
    values: dict[str, list[float]] = {}
    for run in runs:
        if run.variant.method == SINGLE_TASK:
            for name, value in metrics(run.measured).items():
                values.setdefault(name, []).append(value)
    return {name: Estimate.of(of_seeds) for name, of_seeds in values.items()}


def delta_m_of(
    metrics: Mapping[str, float], against: Mapping[str, float], higher_is_better: Mapping[str, bool]
) -> float:
    """Δm% of one evaluation against baselines (Eq. 14)."""
    metric = DeltaM(against, higher_is_better)
    metric.update(metrics)
    return float(metric.compute())


def compare(runs: Sequence[Run], higher_is_better: Mapping[str, bool]) -> list[Summary]:
    """Summarize the runs of one problem, one entry a variant in the order of their first runs.

    Args:
        runs: Single-task runs, which give the baselines, and runs of each variant from the same seeds.
        higher_is_better: For each metric whether a higher value is better.

    Raises:
        ValueError: If two variants have different seeds: then nothing is paired.
    """
    against = {name: estimate.mean for name, estimate in baselines(runs).items()}
    by_variant: dict[Variant, dict[int, Measured]] = {}
    for run in runs:
        if run.variant.method != SINGLE_TASK:
            by_variant.setdefault(run.variant, {})[run.seed] = run.measured
    seeds = {variant: sorted(of_seeds) for variant, of_seeds in by_variant.items()}
    if len({tuple(of_variant) for of_variant in seeds.values()}) > 1:
        raise ValueError(
            f"All variants need runs from the same seeds; got { ({str(v): s for v, s in seeds.items()}) }."
        )

    ranks = MeanRank([str(variant) for variant in by_variant], higher_is_better)
    delta_m: dict[Variant, dict[int, float]] = {}
    for variant, of_seeds in by_variant.items():
        for seed, measured in sorted(of_seeds.items()):
            ranks.update(str(variant), measured.test)
            delta_m.setdefault(variant, {})[seed] = delta_m_of(measured.test, against, higher_is_better)
    mean_ranks = ranks.compute()

    summaries = []
    for variant, of_seeds in by_variant.items():
        measured_runs = list(of_seeds.values())
        change = None
        if variant.callback:
            plain = delta_m[variant.plain]
            change = Estimate.of([value - plain[seed] for seed, value in delta_m[variant].items()])
        looks = [look.conflict for measured in measured_runs for look in measured.looks]
        reports = [report for measured in measured_runs for report in measured.reports]
        summaries.append(
            Summary(
                variant=variant,
                metrics={
                    name: Estimate.of([measured.test[name] for measured in measured_runs]) for name in higher_is_better
                },
                delta_m=Estimate.of(list(delta_m[variant].values())),
                change=change,
                mean_rank=float(mean_ranks[str(variant)]),
                conflict_share=statistics.fmean(looks),
                tried=len(reports),
                accepted=sum(report.accepted for report in reports),
                seconds=statistics.fmean(measured.seconds for measured in measured_runs),
            )
        )
    return summaries
