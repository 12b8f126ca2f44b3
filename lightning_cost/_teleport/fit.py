"""The teleports of one fit: what they share with its Trainer, its module and its optimizer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_cost._arguments import describe
from lightning_cost._lightning.progress import StageDisplay
from lightning_cost._lightning.ranks import Ranks
from lightning_cost._teleport.optimizer_state import HistoryReuse
from lightning_cost._teleport.report import TeleportReport, append_report, report_of_outcome, report_of_start
from lightning_cost._teleport.run import Outcome, Teleporter
from lightning_cost._training.engine import Engine
from lightning_cost._training.evaluate import repeated, unrepeatable_message
from lightning_cost._training.shared import check_parameters, shared_modules, shared_parameters
from lightning_cost._training.step import Step
from lightning_cost._vectors import num_elements
from lightning_cost.gradients import TaskGradients
from lightning_cost.searches import Search
from lightning_cost.searches._adapters import left_out
from lightning_cost.surface import Point, Surface

__all__: list[str] = []

Unrepeatable: TypeAlias = Literal["raise", "skip"]
"""What to do where ``task_losses`` is not repeatable: raise an error, or skip the teleport with a warning."""

UNREPEATABLE: tuple[Unrepeatable, ...] = get_args(Unrepeatable)

# Every so many teleports the losses are evaluated once where the teleport starts.
_REPEAT_EVERY = 16


@dataclass
class RepeatCheck:
    """When to look whether the losses come back.

    Attributes:
        unrepeatable: What to do where they do not.
        teleports_left: Number of teleports before the next look.
    """

    unrepeatable: Unrepeatable
    teleports_left: int = 0


class FitTeleports:
    """Teleports in the optimizer steps of one fit.

    Args:
        teleporter: How to teleport.
        history: What the optimizer keeps of its history.
        optimizer: The optimizer of the fit.
        module: The module of the fit.
        generator: Source of the random numbers of the search.
        check_ranks: Whether to compare the processes after each teleport.
        repeats: When to look whether the losses come back.

    Attributes:
        ranks: The processes of the fit.
    """

    def __init__(
        self,
        teleporter: Teleporter,
        history: HistoryReuse,
        optimizer: Optimizer,
        module: LightningModule,
        generator: torch.Generator,
        check_ranks: bool,
        repeats: RepeatCheck,
    ) -> None:
        self.ranks = Ranks.of(module)
        self._teleporter = teleporter
        self._history = history
        self._optimizer = optimizer
        self._module = module
        self._engine = Engine(module)
        self._generator = generator
        self._check_ranks = check_ranks
        self._repeats = repeats
        self._warned = False
        self._hook = optimizer.register_step_pre_hook(history.pre_step_hook)

    def close(self) -> None:
        """Leave the optimizer as it was, and free memory."""
        self._hook.remove()
        self._history.disarm()
        self._teleporter.clear()

    def teleport(self, trainer: Trainer, reports: list[TeleportReport]) -> TeleportReport:
        """Teleport before the optimizer step under way, and let it go on from there.

        Args:
            trainer: The Trainer.
            reports: Where the report is added, also if an exception ends the teleport.
        """
        began = time.perf_counter()
        engine, step = self._engine, self._engine.step
        assert step is not None
        # Lightning divides by the full number of micro-batches, even if the last window of an epoch has fewer.
        share = len(step.batches) / trainer.accumulate_grad_batches
        gradients = step.gradients
        assert gradients is not None
        if share != 1:
            gradients = TaskGradients(gradients.names, gradients.matrix / share)
        start = Point(step.losses(gradients.names, self.ranks), gradients)
        surface = self._surface(step, gradients.names)

        def counted(report: TeleportReport) -> TeleportReport:
            report.seconds = time.perf_counter() - began
            report.forwards, report.backwards = surface.forwards, surface.backwards
            return report

        outcome, stay, free = Outcome(False, "", start, start), engine.undo_of_move(), None
        # Make the report now. After an out-of-memory error there may be no memory for it.
        started = report_of_start(start, trainer.global_step, trainer.current_epoch)
        try:
            with torch.enable_grad(), engine.without_trace(), StageDisplay(trainer) as display:
                refusal = self._refusal(step, surface, start)
                if refusal:
                    outcome = Outcome(False, refusal, start, start)
                else:
                    learning_rate = _learning_rate(self._optimizer, surface.shared)
                    outcome = self._teleporter.run(surface, shared_modules(self._module), start, learning_rate, display)
            finished = counted(report_of_outcome(started, outcome, self._teleporter.invariance))
            moved = outcome.end.evaluated
            if outcome.accepted and moved is not None and share != 1:
                moved = TaskGradients(moved.names, moved.matrix.mul_(share))
                surface.scale_grads(share)
            if outcome.accepted and self._check_ranks:
                self.ranks.check_equal(surface.shared)
            if outcome.accepted:
                free = engine.move_to(moved, outcome.end.losses)
        except BaseException as error:
            outcome.undo()
            stay()
            started.reason = f"{type(error).__name__}: {error}"
            append_report(reports, counted(started))
            raise
        self._repeats.teleports_left = max(self._repeats.teleports_left - 1, 0)
        if outcome.accepted:
            self._history.arm(outcome.sigma, surface.shared)
            if free is not None:
                self._teleporter.recycle(free)
        append_report(reports, finished)
        return finished

    def _surface(self, step: Step, names: Sequence[str]) -> Surface:
        module, engine = self._module, self._engine
        assert step.accumulator is not None
        return Surface(
            [partial(engine.replay, batch) for batch in step.batches],
            step.accumulator.shared,
            list(module.parameters()),
            engine.scalarize_again,
            self._generator,
            engine.numerics,
            names,
        )

    def _refusal(self, step: Step, surface: Surface, start: Point) -> str:
        """Why a teleport cannot start here; empty if it can.

        Raises:
            RuntimeError: If ``task_losses`` is not repeatable, and this is an error.
        """
        try:
            self._teleporter.search.reach(shared_modules(self._module), surface.shared)
        except ValueError:
            return "the search reaches no parameter that the optimizer trains now"
        changed = [batch.changed_tensor for batch in step.batches if batch.changed_tensor is not None]
        if self.ranks.any_of([bool(changed)])[0]:
            where = f" ({changed[0]})" if changed else ""
            return f"task_losses has changed its batch or a frozen parameter{where}; later ones are copied first"
        if self._repeats.teleports_left > 0:
            return ""
        changes = repeated(start.losses, surface.losses(), start.gradients.names)
        if not changes:
            # Where losses did not come back, the next teleport looks again.
            self._repeats.teleports_left = _REPEAT_EVERY
            return ""
        message = unrepeatable_message("SymmetryTeleportCallback", changes)
        if self._repeats.unrepeatable == "raise":
            raise RuntimeError(
                f"{message} Pass `unrepeatable='skip'` to train on without teleports where this happens."
            )
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"{message} These teleports are skipped.")
        return f"the losses do not come back where the teleport starts: {changes}"


def check_reach(search: Search, module: LightningModule) -> str:
    """What a search leaves out of the shared modules, in words; empty if that needs no warning.

    Raises:
        MisconfigurationException: If the search reaches no shared parameter.
    """
    check_parameters(module)
    modules, shared = shared_modules(module), shared_parameters(module)
    if not shared:
        # Frozen for now. Each teleport looks again.
        return ""
    try:
        reached = search.reach(modules, shared)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    known = {id(parameter) for parameter in shared}
    if not isinstance(reached, Sequence) or not reached or not all(id(parameter) in known for parameter in reached):
        name = type(search).__name__
        raise MisconfigurationException(
            f"`{name}.reach` must return some of the shared parameters; got {describe(reached)}. Raise a ValueError in"
            " it if the search reaches none of them."
        )
    share = num_elements(reached) / num_elements(shared)
    missing = left_out(modules, shared, search.is_target, reached)
    if not missing and share >= 0.5:
        return ""
    return (
        f"Teleports take steps in {share:.0%} of the shared parameters: {search!r} leaves out"
        f" {', '.join(missing) or 'all parameters with fewer than two dimensions'}."
    )


def _learning_rate(optimizer: Optimizer, shared: Sequence[Parameter]) -> float:
    """The learning rate of the first shared parameter."""
    ids = {id(parameter) for parameter in shared}
    groups = (group for group in optimizer.param_groups if any(id(parameter) in ids for parameter in group["params"]))
    rate = next(groups).get("lr")
    return 1e-3 if rate is None else float(rate)
