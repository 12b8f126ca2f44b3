"""Segmentation, depth and normals of drawn rooms, from nothing: `make scenes`, or `python -m recipes.scenes.demo`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning as L
from rich.console import Console
from rich.table import Table

from recipes.common.compare import SINGLE_TASK, Variant
from recipes.common.training import be_a_quiet_worker
from recipes.dense.examples import DenseExamples
from recipes.dense.mean_predictor import MeanPredictor
from recipes.scenes.problems import ROOMS, RoomsProblem
from recipes.study import Study
from recipes.study.demo import Demo
from recipes.study.problem import find_problem
from recipes.study.report import write_csv
from recipes.study.statistics import group

__all__ = ["DEMO", "main"]

_SMALL = "num_train=8,num_val=4,height=32,width=32,batch_size=2,widths=[4, 4, 4, 4, 4],look_every=1,evaluations=2"


def _conclude(study: Study, console: Console) -> Iterator[tuple[str, Path]]:
    """Compare with what can be predicted without an image: has anything been learned?"""
    (name,) = {row.problem for row in study.rows}
    problem = find_problem(name)
    assert isinstance(problem, RoomsProblem)
    runs = group(study.results("test").records[name])
    rows = {"mean of the targets": _mean_predictor_metrics(problem)}
    for variant in (Variant(SINGLE_TASK), *(row.variant for row in study.rows)):
        of_seeds = [measured.test for measured in runs[variant].values()]
        rows[str(variant)] = {name: statistics.fmean(metrics[name] for metrics in of_seeds) for name in of_seeds[0]}

    directions = problem.higher_is_better
    heads = (f"{metric.replace('_', ' ')} {'↑' if higher else '↓'}" for metric, higher in directions.items())
    table = Table("", *heads, title="What was learned, beside the mean of the targets")
    for row, metrics in rows.items():
        table.add_row(row, *(f"{metrics[metric]:.3f}" for metric in directions))
    console.print(table)
    path = study.output / "scenes_metrics.csv"
    write_csv(path, [{"row": row, **{name: metrics[name] for name in directions}} for row, metrics in rows.items()])
    yield "the metrics above", path
    for spec in study.specs:
        if spec.task is None and spec.seed == study.seeds[0]:
            for path in sorted(study.folder(spec).rglob("*.png")):
                yield f"{path.parent.name}: {spec.variant}", path


def _mean_predictor_metrics(problem: RoomsProblem) -> dict[str, float]:
    channels = {name: target.channels for name, target in ROOMS.chosen_tasks(problem.tasks).items()}
    data, model = problem.make_data(problem.tasks, seed=0), problem.make_model(problem.tasks, None)
    examples = DenseExamples(data.root / "train", ROOMS, problem.tasks, problem.num_train)
    model.add_module("network", MeanPredictor((examples[0, number] for number in range(len(examples))), channels))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    (metrics,) = L.Trainer(accelerator="cpu", devices=1, **quiet).validate(model, data, verbose=False)
    return {name.removeprefix("val/"): value for name, value in metrics.items()}


DEMO = Demo(
    module="recipes.scenes.demo",
    description="FairGrad with and without COST on drawn rooms",
    name="scenes",
    problems={"scenes:rooms": f"scenes:rooms,{_SMALL}"},
    quick="12 tiny rooms",
    methods=("FairGrad",),
    conclude=_conclude,
)


def main(args: Sequence[str] | None = None) -> int:
    """Draw rooms, compare FairGrad with and without COST, and draw what they predict; see `Demo.run`."""
    be_a_quiet_worker()
    return DEMO.run(args)


if __name__ == "__main__":
    raise SystemExit(main())
