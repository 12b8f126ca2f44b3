"""Runs side by side: Δm% along training, and paired changes at equal steps and at equal time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from lightning_cost.metrics import delta_m, mean_rank
from recipes.common.compare import SINGLE_TASK, Estimate, Variant
from recipes.common.problem import Problem
from recipes.common.training import Evaluation, Measured
from recipes.study.store import Record

__all__ = ["Change", "Curve", "RowSummary", "Split", "delta_m_curves", "final_metrics", "group", "paired_change"]

Split = Literal["validation", "test"]
_LEAST_SEEDS, _RESAMPLES = 4, 9999


@dataclass(frozen=True)
class Curve:
    """Δm% of one run along training, after optimizer steps and seconds of CPU time; all of shape (T,)."""

    steps: np.ndarray
    seconds: np.ndarray
    values: np.ndarray

    @property
    def pace(self) -> float:
        """Seconds per step."""
        return float(self.seconds[-1] / self.steps[-1])

    def at_step(self, step: float) -> float:
        """The interpolated value after a number of steps."""
        return float(np.interp(step, self.steps, self.values))

    def at_second(self, second: float) -> float:
        """The interpolated value after a training time. It is NaN before the first evaluation."""
        return float(np.interp(second, self.seconds, self.values, left=math.nan))


@dataclass(frozen=True)
class Change:
    """A paired change of Δm% over seeds; negative is better.

    Attributes:
        mean: Mean over the seeds.
        error: Its standard error; NaN for one seed.
        low: Lower end of the bootstrap 95% interval; NaN for fewer than four seeds.
        high: Upper end.
        better: In how many seeds the change is negative.
        seeds: Number of seeds.
    """

    mean: float
    error: float
    low: float
    high: float
    better: int
    seeds: int


@dataclass(frozen=True)
class RowSummary:
    """One row of a table.

    Attributes:
        variant: The method, without a callback or with one.
        metrics: Metrics at the end.
        delta_m: Δm% at the end.
        same_steps: Change after the same number of steps, against the method without a callback. None without one.
        same_time: Change after the same training time.
        mean_rank: Mean rank over the metrics, among the rows of the problem.
        conflict: Share of conflicting steps among those that were looked at.
        tried: Teleports tried, in all seeds.
        accepted: Those of them that were accepted.
        milliseconds: Mean CPU time of a training step.
        slowdown: Time of a step relative to the method without a callback, median over the seeds.
    """

    variant: Variant
    metrics: dict[str, Estimate]
    delta_m: Estimate
    same_steps: Change | None
    same_time: Change | None
    mean_rank: float
    conflict: float
    tried: int
    accepted: int
    milliseconds: float
    slowdown: float | None


def paired_change(differences: Sequence[float]) -> Change:
    """Mean of paired differences and its studentized bootstrap 95% interval ("bootstrap-t").

    With 5 seeds of normal differences it misses the truth in 6 of 100 studies. The bias-corrected and accelerated
    interval, the usual choice, misses it in 19, and in 10 with 10 seeds. Fewer than 4 seeds have no interval.
    """
    values, count = np.asarray(differences, dtype=float), len(differences)
    if np.isnan(values).any():
        return Change(math.nan, math.nan, math.nan, math.nan, 0, count)
    estimate = Estimate.of(values.tolist())
    low = high = math.nan
    if count >= _LEAST_SEEDS:
        samples = values[np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))]
        errors = samples.std(axis=1, ddof=1)
        # A resample that repeats a single value has no spread to compare its mean with.
        spread = errors > 1e-9 * (values.std() or 1.0)
        ratios = (samples.mean(axis=1) - values.mean())[spread] / errors[spread]
        upper, lower = np.quantile(ratios, [0.975, 0.025]) if spread.any() else (0.0, 0.0)
        low, high = (float(values.mean() - end * values.std(ddof=1)) for end in (upper, lower))
    return Change(estimate.mean, estimate.error, low, high, int((values < 0).sum()), count)


def summarize(problem: Problem, records: Iterable[Record], split: Split) -> list[RowSummary]:
    """Summarize the runs of one problem, including its single-task runs: one entry per variant, in their order."""
    by_variant = group(records)
    curves = delta_m_curves(problem, by_variant, split)
    metrics = {variant: final_metrics(problem, by_variant[variant].values(), split) for variant in curves}
    means = torch.tensor([[estimate.mean for estimate in of_row.values()] for of_row in metrics.values()])
    ranks = mean_rank(means, list(problem.higher_is_better.values())).tolist()

    summaries = []
    for (variant, of_seeds), rank in zip(curves.items(), ranks, strict=True):
        runs = by_variant[variant].values()
        looks = [look.conflict for measured in runs for look in measured.looks]
        reports = [report for measured in runs for report in measured.reports]
        same_steps = same_time = slowdown = None
        if variant.callback and variant.plain in curves:
            pairs = [(curve, curves[variant.plain][seed]) for seed, curve in of_seeds.items()]
            steps = [(a, b, min(a.steps[-1], b.steps[-1])) for a, b in pairs]
            seconds = [(a, b, min(a.seconds[-1], b.seconds[-1])) for a, b in pairs]
            same_steps = paired_change([a.at_step(end) - b.at_step(end) for a, b, end in steps])
            same_time = paired_change([a.at_second(end) - b.at_second(end) for a, b, end in seconds])
            slowdown = statistics.median(a.pace / b.pace for a, b in pairs)
        summaries.append(
            RowSummary(
                variant=variant,
                metrics=metrics[variant],
                delta_m=Estimate.of([float(curve.values[-1]) for curve in of_seeds.values()]),
                same_steps=same_steps,
                same_time=same_time,
                mean_rank=rank,
                conflict=statistics.fmean(looks) if looks else math.nan,
                tried=len(reports),
                accepted=sum(report.accepted for report in reports),
                milliseconds=1000 * statistics.fmean(curve.pace for curve in of_seeds.values()),
                slowdown=slowdown,
            )
        )
    return summaries


def group(records: Iterable[Record]) -> dict[Variant, dict[int, Measured]]:
    """Group runs by variant and seed. The single-task runs of a seed become one, with the metrics of all tasks."""
    by_variant: dict[Variant, dict[int, Measured]] = {}
    for record in records:
        of_seeds = by_variant.setdefault(record.spec.variant, {})
        seed, measured = record.spec.seed, record.measured
        of_seeds[seed] = _merged(of_seeds[seed], measured) if seed in of_seeds else measured
    return by_variant


def final_metrics(problem: Problem, runs: Iterable[Measured], split: Split) -> dict[str, Estimate]:
    """Metrics at the end of training, over the seeds."""
    ends = [measured.curve(split)[-1].metrics for measured in runs]
    return {name: Estimate.of([metrics[name] for metrics in ends]) for name in problem.higher_is_better}


def delta_m_curves(
    problem: Problem, by_variant: Mapping[Variant, Mapping[int, Measured]], split: Split
) -> dict[Variant, dict[int, Curve]]:
    """Δm% of every run along training (Eq. 14), against the mean of the finished single-task runs."""
    singles = final_metrics(problem, by_variant[Variant(SINGLE_TASK)].values(), split)
    against, directions = [estimate.mean for estimate in singles.values()], list(problem.higher_is_better.values())

    def curve(measured: Measured) -> Curve:
        taken = measured.curve(split)
        values = [[evaluation.metrics[name] for name in singles] for evaluation in taken]
        return Curve(
            np.array([evaluation.step for evaluation in taken]),
            np.array([evaluation.seconds for evaluation in taken]),
            delta_m(torch.tensor(values, dtype=torch.float64), against, directions).numpy(),
        )

    return {
        variant: {seed: curve(measured) for seed, measured in runs.items()}
        for variant, runs in by_variant.items()
        if variant.method != SINGLE_TASK
    }


def _merged(first: Measured, second: Measured) -> Measured:
    def both(split: Split) -> list[Evaluation]:
        pairs = zip(first.curve(split), second.curve(split), strict=True)
        return [Evaluation(a.step, {**a.metrics, **b.metrics}, a.seconds + b.seconds) for a, b in pairs]

    return replace(first, test={**first.test, **second.test}, validation=both("validation"), test_curve=both("test"))
