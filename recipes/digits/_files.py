"""The CSV and JSON files of the demo."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_cost import TeleportReport
from recipes.common.compare import SINGLE_TASK, Estimate, Run, Summary, Variant, baselines, delta_m_of
from recipes.digits._runs import PROBLEMS, RunSpec

__all__ = ["write_files"]

_METRICS = list(dict.fromkeys(name for problem in PROBLEMS.values() for name in problem.higher_is_better))


def write_files(
    runs: Mapping[RunSpec, Run], summaries: Mapping[str, Sequence[Summary]], folder: Path
) -> Iterator[tuple[str, Path]]:
    """Write what was measured; a cell that has no value is empty.

    Args:
        runs: All runs.
        summaries: Key of a problem to its variants.
        folder: Where to write.

    Yields:
        What a file holds, and the file.
    """
    compared = {spec: run for spec, run in runs.items() if spec.teleport == "default"}
    yield "one row a run", _write_csv(folder / "results.csv", _results(compared))
    yield "one row a method", _write_csv(folder / "summary.csv", _summary(compared, summaries))
    yield "validation metrics along training", _write_csv(folder / "validation.csv", _validation(compared))

    seed = min(spec.seed for spec in runs)
    cost = Variant("LS", "COST")
    shown = {s.teleport: r for s, r in runs.items() if (s.problem, s.variant, s.seed) == ("narrow", cost, seed)}
    rows = [_teleport(report) for report in shown["default"].measured.reports]
    path = _write_csv(folder / "teleports.csv", rows)
    yield f"one row a teleport of {cost} on the narrow problem, seed {seed}", path
    firsts = {name: [asdict(report) for report in run.measured.reports[:1]] for name, run in shown.items()}
    path = folder / "teleport_trace.json"
    path.write_text(json.dumps(firsts, indent=1) + "\n", encoding="utf-8")
    yield "the first teleport of three searches, with its trace", path


def _write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _results(runs: Mapping[RunSpec, Run]) -> Iterator[dict[str, Any]]:
    for name, problem in PROBLEMS.items():
        of_problem = {spec: run for spec, run in runs.items() if spec.problem == name}
        against = {metric: estimate.mean for metric, estimate in baselines(of_problem.values()).items()}
        for spec, run in of_problem.items():
            measured = run.measured
            row = _head(spec) | {"steps": measured.steps} | _cells(measured.test)
            row |= {"delta_m": None, "first_step_loss": None, "steps_looked_at": None, "conflicting": None}
            if spec.task is None:
                row |= {
                    "delta_m": delta_m_of(measured.test, against, problem.higher_is_better),
                    "first_step_loss": measured.looks[0].mean_loss,
                    "steps_looked_at": len(measured.looks),
                    "conflicting": sum(look.conflict for look in measured.looks),
                }
            yield row | {
                "teleports_tried": len(measured.reports),
                "teleports_accepted": sum(report.accepted for report in measured.reports),
                "seconds": measured.seconds,
                "cpu_seconds": measured.cpu_seconds,
            }


def _validation(runs: Mapping[RunSpec, Run]) -> Iterator[dict[str, Any]]:
    for spec, run in runs.items():
        for evaluation in run.measured.validation:
            yield _head(spec) | {"step": evaluation.step} | _cells(evaluation.metrics)


def _summary(runs: Mapping[RunSpec, Run], summaries: Mapping[str, Sequence[Summary]]) -> Iterator[dict[str, Any]]:
    for name, of_problem in summaries.items():
        singles = baselines(run for spec, run in runs.items() if spec.problem == name)
        yield {"problem": name, "method": SINGLE_TASK, "cost": 0} | _estimates(singles)
        for summary in of_problem:
            estimates = dict(summary.metrics, delta_m=summary.delta_m)
            if summary.change is not None:
                estimates["change_by_cost"] = summary.change
            yield {
                "problem": name,
                "method": summary.variant.method,
                "cost": int(bool(summary.variant.callback)),
                **_estimates(estimates),
                "mean_rank": summary.mean_rank,
                "conflict_share": summary.conflict_share,
                "teleports_tried": summary.tried,
                "teleports_accepted": summary.accepted,
                "seconds": summary.seconds,
            }


def _head(spec: RunSpec) -> dict[str, Any]:
    variant = spec.variant
    return {
        "problem": spec.problem,
        "method": variant.method,
        "cost": int(bool(variant.callback)),
        "task": spec.task,
        "seed": spec.seed,
    }


def _cells(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics of all problems, so that every row has the same columns in the same order."""
    return {name: metrics.get(name) for name in _METRICS}


def _estimates(estimates: Mapping[str, Estimate]) -> dict[str, float | None]:
    cells: dict[str, float | None] = {}
    for name in (*_METRICS, "delta_m", "change_by_cost"):
        estimate = estimates.get(name)
        cells[name] = None if estimate is None else estimate.mean
        cells[f"{name}_se"] = None if estimate is None or math.isnan(estimate.error) else estimate.error
    return cells


def _teleport(report: TeleportReport) -> dict[str, Any]:
    row = asdict(report)
    del row["trace"]
    for name in ("losses_before", "losses_after", "cosines_before", "cosines_after"):
        row |= {f"{name}_{task}": value for task, value in row.pop(name).items()}
    return row
