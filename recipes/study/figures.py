"""Figures of a study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lightning_cost.plots import Curves, before_after, intervals, learning_curves
from recipes.common.compare import SINGLE_TASK, Variant
from recipes.common.training import Measured
from recipes.study.statistics import Change, Curve, RowSummary, Split

__all__ = ["draw"]

_POINTS = 40
_LOOKS_A_SPAN = 5
_LINEAR_UP_TO = 100.0
_SHOWN = 4


def draw(
    stem: str,
    by_variant: Mapping[Variant, Mapping[int, Measured]],
    curves: Mapping[Variant, Mapping[int, Curve]],
    summaries: Sequence[RowSummary],
    folder: Path,
    split: Split,
) -> Iterator[tuple[str, Path]]:
    """Write the figures of one problem.

    Args:
        stem: Of the files' names.
        by_variant: The runs of the problem, see `group`.
        curves: Their Δm%, see `delta_m_curves`.
        summaries: Their summaries.
        folder: Where to write.
        split: Which split the curves are of.

    Yields:
        What a figure shows, and its file.
    """
    methods = list(dict.fromkeys(variant.method for variant in curves))
    by_method = {method: {v: c for v, c in curves.items() if v.method == method} for method in methods}
    label = f"{split} Δm%"
    highest = max(float(curve.values.max()) for of_seeds in curves.values() for curve in of_seeds.values())
    limit = _LINEAR_UP_TO if highest > _LINEAR_UP_TO else None

    path = folder / f"{stem}_curves_steps.png"
    panels = {
        method: {_label(variant): _over_steps(list(of_seeds.values())) for variant, of_seeds in variants.items()}
        for method, variants in by_method.items()
    }
    learning_curves(panels, label, logarithmic_above=limit).savefig(path)
    yield "Δm% against optimizer steps, mean and range over the seeds", path

    path = folder / f"{stem}_curves_time.png"
    panels = {
        method: {_label(variant): _over_time(list(of_seeds.values())) for variant, of_seeds in variants.items()}
        for method, variants in by_method.items()
    }
    learning_curves(panels, label, logarithmic_above=limit, xlabel="CPU time of training, s").savefig(path)
    yield "Δm% against training time (Fig. 11)", path

    changed = [summary for summary in summaries if summary.same_steps is not None]
    if changed:
        path = folder / f"{stem}_changes.png"
        intervals(
            {
                "at equal steps": {str(s.variant): _ends(s.same_steps) for s in changed},
                "at equal time": {str(s.variant): _ends(s.same_time) for s in changed},
            },
            f"change of {label}",
        ).savefig(path)
        yield "paired changes with their 95% intervals", path

    path = folder / f"{stem}_conflict.png"
    panels = {
        method: {_label(variant): _conflict_share(list(by_variant[variant].values())) for variant in variants}
        for method, variants in by_method.items()
    }
    learning_curves(panels, "share of conflicting steps").savefig(path)
    yield "share of conflicting steps along training (Fig. 5a)", path

    moved = {
        str(variant): next(iter(runs.values())).reports
        for variant, runs in by_variant.items()
        if variant.method != SINGLE_TASK and any(report.accepted for report in next(iter(runs.values())).reports)
    }
    if moved:
        path = folder / f"{stem}_before_after.png"
        before_after(dict(list(moved.items())[:_SHOWN])).savefig(path)
        yield f"cosines and gradient norms before and after teleports, first seed, {_SHOWN} rows at most (Fig. 8)", path


def _label(variant: Variant) -> str:
    return variant.callback or "without"


def _over_steps(curves: Sequence[Curve]) -> Curves:
    last = min(curve.steps[-1] for curve in curves)
    steps = [int(step) for step in curves[0].steps if step <= last]
    return Curves(steps, [[curve.at_step(step) for step in steps] for curve in curves])


def _over_time(curves: Sequence[Curve]) -> Curves:
    first, last = max(curve.seconds[0] for curve in curves), min(curve.seconds[-1] for curve in curves)
    seconds = np.linspace(min(first, last), last, _POINTS)
    return Curves(list(seconds), [[curve.at_second(second) for second in seconds] for curve in curves])


def _conflict_share(runs: Sequence[Measured]) -> Curves:
    """Shares over spans of the training, each wide enough to hold some of the steps that were looked at."""
    count = min(len(run.looks) for run in runs)
    spans = min(max(1, count // _LOOKS_A_SPAN), _POINTS)
    edges = np.linspace(0, min(run.steps for run in runs), spans + 1)
    shares = []
    for run in runs:
        places = np.digitize([look.step for look in run.looks], edges) - 1
        flags = np.array([look.conflict for look in run.looks], dtype=float)
        shares.append([flags[places == span].mean() for span in range(spans)])
    return Curves(list((edges[:-1] + edges[1:]) / 2), shares)


def _ends(change: Change | None) -> tuple[float, float, float]:
    assert change is not None
    return change.mean, change.low, change.high
