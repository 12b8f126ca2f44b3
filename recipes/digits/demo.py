"""Multi-task training with and without COST on real digits: `make demo`, or `python -m recipes.digits.demo`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from scipy.stats import t as student_t

from lightning_cost.plots import ConflictTrace, conflict_against_loss, teleport_trace
from recipes.common.compare import Variant
from recipes.study import Study
from recipes.study.demo import Demo
from recipes.study.problem import find_problem
from recipes.study.runner import run_missing
from recipes.study.spec import RunSpec

__all__ = ["DEMO", "caption", "main"]

_SEARCHES = {
    "paper": "the paper's: penalty, Eq. 9 as printed",
    "penalty search": "penalty, conflict objective",
    "COST": "default: level set, conflict objective",
}
_CAPTION = """\
**What these numbers do not show.** {spread} A small change may well be chance, and of six changes one can look large by
chance. The seeds vary the initial weights and the order of the batches, but not the images.

All methods take the same number of *steps*, which is not the same time. The steps are few, so that the demo ends within
minutes: the networks are far from converged. With more steps the differences may grow, shrink or turn.

No model is selected on the test digits. But they are not new to COST: the prototype that led to its defaults was judged
on them. The problems were not drawn at random: the narrow, imbalanced one is here because that prototype saw a gain by
COST on it, the balanced one because it saw none. Neither proves anything about other problems."""


def caption(num_seeds: int) -> str:
    """What the tables do not show, for a number of seeds."""
    spread = "One seed has no standard error and shows no difference between methods."
    if num_seeds > 1:
        errors = f"{student_t.ppf(0.975, num_seeds - 1):.1f} standard errors"
        spread = f"A 95% interval of a mean over {num_seeds} seeds is {errors} wide to each side (Student's t)."
    return _CAPTION.format(spread=spread)


def _conclude(study: Study, console: Console) -> Iterator[tuple[str, Path]]:
    """Draw single teleports by three searches (Fig. 5b), and conflict along training (Fig. 3)."""
    console.print()
    console.print(Markdown(caption(len(study.seeds))))
    seed, store = study.seeds[0], study.store
    runs = {(spec.problem, spec.variant): store.load(spec).measured for spec in study.specs if spec.seed == seed}
    narrow = study.rows[0].problem

    # With two tasks, the triggers of the paper and of the defaults agree: all three first teleports start from the same
    # weights on the same batch.
    others = {name: RunSpec(narrow, Variant("LS", name), seed, epochs=2) for name in _SEARCHES if name != "COST"}
    run_missing(list(others.values()), store, 1, console)
    reports = {name: store.load(spec).measured.reports for name, spec in others.items()}
    reports["COST"] = runs[narrow, Variant("LS", "COST")].reports
    path = study.output / "demo_teleport_trace.png"
    if all(reports.values()):
        teleport_trace({title: reports[name][0] for name, title in _SEARCHES.items()}).savefig(path)
        yield "losses and objective within one teleport, by three searches from the same point (Fig. 5b)", path

    traces = {}
    for row in study.rows:
        if row.variant.method == "LS":
            run = runs[row.problem, row.variant]
            losses = [statistics.fmean(look.losses.values()) for look in run.looks]
            steps, conflicts = [look.step for look in run.looks], [look.conflict for look in run.looks]
            title = f"{find_problem(row.problem).title}: {row.variant}"
            traces[title] = ConflictTrace(steps, losses, conflicts, run.reports)
    path = study.output / "demo_conflict_vs_loss.png"
    conflict_against_loss(traces).savefig(path)
    yield f"conflict and mean loss along training, seed {seed} (Fig. 3)", path


DEMO = Demo(
    module="recipes.digits.demo",
    description="LS, FairGrad and UPGrad with and without COST on overlaid digits",
    name="demo",
    problems={
        "digits:narrow,epochs=10": "digits:narrow,epochs=2,num_train=1280",
        "digits:balanced,epochs=4": "digits:balanced,epochs=2,num_train=1280",
    },
    quick="2 epochs, fewer images",
    methods=("LS", "FairGrad", "UPGrad"),
    conclude=_conclude,
    seeds=3,
)


def main(args: Sequence[str] | None = None) -> int:
    """Train two problems with and without COST, and write tables and figures; see `Demo.run`."""
    return DEMO.run(args)


if __name__ == "__main__":
    raise SystemExit(main())
