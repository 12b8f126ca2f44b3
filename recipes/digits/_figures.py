"""The figures of the demo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lightning_cost.plots import (
    ConflictTrace,
    Curves,
    before_after,
    conflict_against_loss,
    learning_curves,
    teleport_trace,
)
from recipes.common.compare import Run, Variant, baselines, delta_m_of
from recipes.common.training import Measured
from recipes.digits._runs import METHODS, PROBLEMS, RunSpec

__all__ = ["draw"]

_SEARCHES = {
    "paper": "the paper's: penalty, Eq. 9 as printed",
    "penalty": "penalty, conflict objective",
    "default": "default: level set, conflict objective",
}


def draw(runs: Mapping[RunSpec, Run], folder: Path) -> Iterator[tuple[str, Path | None]]:
    """Write the figures.

    Args:
        runs: All runs.
        folder: Where to write.

    Yields:
        What a figure shows, and its file; None where no teleport was accepted that it could show.
    """
    seed = min(spec.seed for spec in runs)
    of_seed = {
        (spec.problem, spec.variant, spec.teleport): run.measured
        for spec, run in runs.items()
        if spec.seed == seed and spec.task is None
    }
    ls, cost = Variant("LS"), Variant("LS", "COST")

    traced = {title: of_seed["narrow", cost, name].reports[:1] for name, title in _SEARCHES.items()}
    path = None
    if all(traced.values()):
        path = folder / "teleport_trace.png"
        teleport_trace({title: report for title, (report,) in traced.items()}).savefig(path)
    yield "losses and objective within one teleport, by three searches from the same point (Fig. 5b)", path

    teleports = {PROBLEMS[name].title: of_seed[name, cost, "default"].reports for name in PROBLEMS}
    moved = {title: reports for title, reports in teleports.items() if any(report.accepted for report in reports)}
    path = None
    if moved:
        path = folder / "before_after.png"
        before_after(moved).savefig(path)
    yield f"cosines and gradient norms before and after each teleport of {cost}, seed {seed} (Fig. 8)", path

    path = folder / "conflict_vs_loss.png"
    conflict_against_loss(
        {
            f"{problem.title}: {variant}": _conflict_trace(of_seed[name, variant, "default"])
            for name, problem in PROBLEMS.items()
            for variant in (ls, cost)
        }
    ).savefig(path)
    yield f"conflict and mean loss along training, seed {seed} (Fig. 3)", path

    path = folder / "curves.png"
    panels = {
        f"{problem.title}: {method}": {
            str(variant): _validation_curves(runs, name, variant)
            for variant in (Variant(method), Variant(method, "COST"))
        }
        for name, problem in PROBLEMS.items()
        for method in METHODS
    }
    learning_curves(panels, ylabel="validation Δm%", logarithmic_above=10).savefig(path)
    yield "learning curves, mean and range over the seeds", path


def _conflict_trace(measured: Measured) -> ConflictTrace:
    return ConflictTrace(
        steps=[look.step for look in measured.looks],
        losses=[look.mean_loss for look in measured.looks],
        conflicts=[look.conflict for look in measured.looks],
        reports=measured.reports,
    )


def _validation_curves(runs: Mapping[RunSpec, Run], name: str, variant: Variant) -> Curves:
    """Δm% on the validation split, against the last validation of the single-task runs."""
    problem = PROBLEMS[name]
    of_problem = [run for spec, run in runs.items() if spec.problem == name]
    against = baselines(of_problem, lambda measured: measured.validation[-1].metrics)
    means = {metric: estimate.mean for metric, estimate in against.items()}
    chosen = [
        run.measured.validation
        for spec, run in runs.items()
        if spec.problem == name and spec.variant == variant and spec.teleport == "default"
    ]
    return Curves(
        steps=[evaluation.step for evaluation in chosen[0]],
        values=[
            [delta_m_of(evaluation.metrics, means, problem.higher_is_better) for evaluation in evaluations]
            for evaluations in chosen
        ],
    )
