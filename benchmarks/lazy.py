"""How often a lazy check overlooks a conflict that a full check finds, and what it saves.

A problem of the study is trained with the mean of the losses, and every step is checked in full. Beside it, the lazy
policy of `lightning_cost.DominatedConflict` is followed on the same gradients, for several `all_tasks_every`.

Run `python -m benchmarks.lazy` for the small problems of the recipes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from benchmarks.step import bare_trainer, quiet
from lightning_cost import SymmetryTeleportCallback, TaskGradients
from lightning_cost._training.accumulator import ExpectedNorms
from lightning_cost._training.engine import Engine
from lightning_cost.triggers import dominated_conflict
from recipes.study.problem import find_problem


@dataclass
class Policy:
    """Lazy checks, and what they have found so far.

    Attributes:
        all_tasks_every: See `DominatedConflict`; ``None`` for no full check without conflict.
    """

    all_tasks_every: int | None
    expected: ExpectedNorms = field(default_factory=ExpectedNorms)
    since: int = 0
    checks: int = 0
    full: int = 0
    conflicts: int = 0
    found: int = 0

    def check(self, gradients: TaskGradients, losses: dict[str, float]) -> None:
        """Follow the policy on the rows of a step."""
        conflict = dominated_conflict(gradients)
        task = self.expected.smallest(losses)
        due = self.all_tasks_every is not None and self.since >= self.all_tasks_every - 1
        looks_at_all = task is None or due
        if task is not None and not looks_at_all:
            index = gradients.names.index(task)
            looks_at_all = bool(gradients.cosines[index] <= 0)
            self.expected.note(task, float(gradients.norms[index]) / abs(losses[task]))
        if looks_at_all:
            self.expected.learn(gradients, losses)
        self.since = 0 if looks_at_all else self.since + 1
        self.checks += 1
        self.full += looks_at_all
        self.conflicts += conflict
        self.found += conflict and looks_at_all


class Follow(L.Callback):
    """Asks for all rows in each step, and shows them to the policies."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.policies = policies

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.request_task_gradients()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        step = Engine(pl_module).step
        assert step is not None
        assert step.accumulator is not None
        gradients = step.accumulator.gradients
        assert gradients is not None
        for policy in self.policies:
            policy.check(gradients, step.accumulator.losses)


def follow(problem_name: str, seed: int, teleports: bool, policies: Sequence[Policy]) -> None:
    """Train a problem, with default teleports at every conflict if wanted."""
    problem = find_problem(problem_name)
    L.seed_everything(seed, verbose=False)
    model, data = problem.make_model(problem.tasks, None), problem.make_data(problem.tasks, seed)
    callbacks: list[L.Callback] = [Follow(policies)]
    if teleports:
        callbacks.append(SymmetryTeleportCallback(start_epoch=0))
    trainer = bare_trainer(max_epochs=problem.epochs, callbacks=callbacks)
    trainer.fit(model, data)


def main() -> None:
    """Parse arguments, follow and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["digits:balanced", "digits:many", "qm9:small"])
    parser.add_argument("--every", type=int, nargs="+", default=[10, 25, 50, 100, 200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet(arguments.threads)
    table = Table(title="Lazy checks of dominated conflict (Eq. 3), by `all_tasks_every`")
    for heading in ("problem", "tasks", "all_tasks_every", "checks", "conflicts", "found", "checks of all tasks"):
        table.add_column(heading, justify="left" if heading == "problem" else "right")
    for name in arguments.problems:
        for teleports in (False, True):
            policies = [Policy(every) for every in (*arguments.every, None)]
            for seed in arguments.seeds:
                for policy in policies:
                    policy.expected, policy.since = ExpectedNorms(), 0
                follow(name, seed, teleports, policies)
            for policy in policies:
                table.add_row(
                    f"{name}, {'teleports' if teleports else 'no teleports'}",
                    str(len(find_problem(name).tasks)),
                    str(policy.all_tasks_every or "never"),
                    str(policy.checks),
                    f"{policy.conflicts / policy.checks:.0%}",
                    f"{policy.found / max(policy.conflicts, 1):.1%}",
                    f"{policy.full / policy.checks:.0%}",
                )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
