"""Figures of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lightning_cost.plots import before_after
from recipes.common.compare import Variant
from recipes.common.training import Look, Measured
from recipes.study.plots import Curves, intervals, learning_curves
from recipes.study.statistics import Curve, RowSummary

__all__ = ["draw", "share_of_looks"]

_POINTS = 40
_LOOKS_PER_SPAN = 5
_LINEAR_UP_TO = 100.0
_MOST_ROWS = 4


def draw(
    stem: str,
    by_variant: Mapping[Variant, Mapping[int, Measured]],
    curves: Mapping[Variant, Mapping[int, Curve]],
    summaries: Sequence[RowSummary],
    folder: Path,
    label: str,
) -> Iterator[tuple[str, Path]]:
    """Write the figures of one problem, and yield what each shows, and its file.

    Args:
        stem: Beginning of the file names.
        by_variant: The runs of the problem, see `group`.
        curves: Their Δm%, see `delta_m_curves`.
        summaries: Their summaries.
        folder: Where to write.
        label: What the curves show.
    """
    over_steps: dict[str, dict[str, Curves]] = {}
    over_time: dict[str, dict[str, Curves]] = {}
    shares: dict[str, dict[str, Curves]] = {}
    for variant, of_seeds in curves.items():
        method, callback, runs = variant.method, variant.callback or "without", list(of_seeds.values())
        over_steps.setdefault(method, {})[callback] = _over_steps(runs)
        over_time.setdefault(method, {})[callback] = _over_time(runs)
        shares.setdefault(method, {})[callback] = share_of_looks(
            list(by_variant[variant].values()), lambda look: look.conflict
        )
    highest = max(float(curve.values.max()) for of_seeds in curves.values() for curve in of_seeds.values())
    limit = _LINEAR_UP_TO if highest > _LINEAR_UP_TO else None

    path = folder / f"{stem}_curves_steps.png"
    learning_curves(over_steps, label, logarithmic_above=limit).savefig(path)
    yield "Δm% against optimizer steps, mean and range over the seeds", path

    path = folder / f"{stem}_curves_time.png"
    learning_curves(over_time, label, logarithmic_above=limit, xlabel="CPU time of training, s").savefig(path)
    yield "Δm% against training time (Fig. 11)", path

    path = folder / f"{stem}_conflict.png"
    learning_curves(shares, "share of conflicting steps").savefig(path)
    yield "share of conflicting steps along training (Fig. 5a)", path

    changes: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in summaries:
        for title, change in (("at equal steps", row.same_steps), ("at equal time", row.same_time)):
            if change is not None:
                changes.setdefault(title, {})[str(row.variant)] = change.mean, change.low, change.high
    if changes:
        path = folder / f"{stem}_changes.png"
        intervals(changes, f"change of {label}").savefig(path)
        yield "paired changes with their 95% intervals", path

    first_seeds = {str(variant): next(iter(by_variant[variant].values())).reports for variant in curves}
    moved = [title for title, reports in first_seeds.items() if any(report.accepted for report in reports)]
    if moved:
        path = folder / f"{stem}_before_after.png"
        before_after({title: first_seeds[title] for title in moved[:_MOST_ROWS]}).savefig(path)
        yield "cosines and gradient norms before and after teleports of the first seed (Fig. 8)", path


def _over_steps(curves: Sequence[Curve]) -> Curves:
    last = min(curve.steps[-1] for curve in curves)
    steps = [int(step) for step in curves[0].steps if step <= last]
    return Curves(steps, [[curve.at_step(step) for step in steps] for curve in curves])


def _over_time(curves: Sequence[Curve]) -> Curves:
    first, last = max(curve.seconds[0] for curve in curves), min(curve.seconds[-1] for curve in curves)
    seconds = np.linspace(min(first, last), last, _POINTS)
    return Curves(list(seconds), [[curve.at_second(second) for second in seconds] for curve in curves])


def share_of_looks(runs: Sequence[Measured], flag: Callable[[Look], bool], most: int = _POINTS) -> Curves:
    """Share of the looks with `flag` over at most so many spans of the training, each wide enough for some looks."""
    count = min(len(run.looks) for run in runs)
    spans = min(max(1, count // _LOOKS_PER_SPAN), most)
    edges = np.linspace(0, min(run.steps for run in runs), spans + 1)
    shares = []
    for run in runs:
        places = np.digitize([look.step for look in run.looks], edges) - 1
        flags = np.array([flag(look) for look in run.looks], dtype=float)
        shares.append([flags[places == span].mean() for span in range(spans)])
    return Curves(list((edges[:-1] + edges[1:]) / 2), shares)
