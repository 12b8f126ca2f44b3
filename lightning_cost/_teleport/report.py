"""What happened in one teleport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_cost._teleport.run import Outcome
from lightning_cost.gradients import TaskGradients
from lightning_cost.invariance import Invariance, drift
from lightning_cost.surface import Point

__all__ = ["TeleportReport"]

_TRACES_KEPT = 10


@dataclass
class TeleportReport:
    r"""What happened in one teleport.

    Attributes:
        step: ``trainer.global_step`` of the optimizer step that the teleport preceded.
        epoch: ``trainer.current_epoch``.
        accepted: Whether the shared parameters were moved. If not, nothing was changed.
        reason: Why, in words.
        losses_before: Task losses on the batch of the step where the teleport started.
        losses_after: The same where it arrived; where it started if it was refused.
        cosines_before: Cosines :math:`\cos \phi_{i0}` of the task gradients with their mean where it started. A task
            without gradient has none.
        cosines_after: The same where it arrived. With ``reevaluate=False`` they are those of the next check, on its
            batch and after the optimizer step; empty until then.
        grad_norm_before: Norm of the mean gradient :math:`g_0` where it started.
        grad_norm_after: The same where it arrived; ``None`` like empty ``cosines_after``.
        sigma: Cosine of the move with the gradient before it (Eq. 12); 0 without a move.
        drift: Largest relative change of a held loss.
        seconds: Wall-clock time.
        forwards: Forward passes of a micro-batch, those at the new point included.
        backwards: Backward passes of a task or of a weighted sum of tasks, those at the new point included.
        reevaluated: Whether the task gradients were evaluated where it arrived. A refused teleport has arrived nowhere.
        checked_at: ``trainer.global_step`` of the check that ``cosines_after`` are of, if it was a later one.
        trace: What was evaluated on the way, in order: dictionaries with a ``stage`` and figures. Only the last few
            reports of a callback keep theirs, and checkpoints hold none.
    """

    step: int
    epoch: int
    accepted: bool
    reason: str
    losses_before: dict[str, float]
    losses_after: dict[str, float]
    cosines_before: dict[str, float]
    cosines_after: dict[str, float]
    grad_norm_before: float
    grad_norm_after: float | None
    sigma: float
    drift: float
    seconds: float
    forwards: int
    backwards: int
    reevaluated: bool = True
    checked_at: int | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)

    @property
    def resolved(self) -> bool:
        """Whether it was accepted, and no task conflicts with the mean where it arrived.

        With ``reevaluate=False`` that is where the next check looked, and False until then.
        """
        cosines = self.cosines_after.values()
        return self.accepted and bool(cosines) and min(cosines) >= 0


@dataclass
class EpochCounts:
    """What a callback has done in an epoch.

    Attributes:
        epoch: The epoch.
        checks: Checks of the trigger.
        conflicts: Checks that found conflict.
        tried: Teleports that were tried.
        accepted: Teleports that were accepted.
        drift: Sum of their drifts.
        cosine_before: Sum of their smallest cosines where they started.
        cosine_after: The same where they arrived, if it was evaluated, or else in the next check.
        evaluated: Number of teleports in ``cosine_after``.
    """

    epoch: int = -1
    checks: int = 0
    conflicts: int = 0
    tried: int = 0
    accepted: int = 0
    drift: float = 0.0
    cosine_before: float = 0.0
    cosine_after: float = 0.0
    evaluated: int = 0

    def count(self, report: TeleportReport) -> None:
        """Count a teleport that was tried, if it was accepted."""
        if report.accepted:
            self.accepted += 1
            self.drift += report.drift
            self.cosine_before += min(report.cosines_before.values())
            if report.cosines_after:
                self.count_after(report)

    def count_after(self, report: TeleportReport) -> None:
        """Count the conflict after a teleport, once it is known."""
        self.evaluated += 1
        self.cosine_after += min(report.cosines_after.values())

    def figures(self) -> dict[str, float]:
        """What is logged of the epoch, by name; nothing without a check."""
        if not self.checks:
            return {}
        found = {
            "cost/conflict_share": self.conflicts / self.checks,
            "cost/accepted": float(self.accepted),
            "cost/rejected": float(self.tried - self.accepted),
        }
        if self.accepted:
            found |= {f"cost/{name}": getattr(self, name) / self.accepted for name in ("drift", "cosine_before")}
        if self.evaluated:
            found["cost/cosine_after"] = self.cosine_after / self.evaluated
        return found


def report_of_start(start: Point, step: int, epoch: int) -> TeleportReport:
    """The report of a teleport that has not moved.

    Args:
        start: Where it starts.
        step: ``trainer.global_step``.
        epoch: ``trainer.current_epoch``.
    """
    losses, cosines = _by_task(start), _cosines(start.gradients)
    norm = float(start.gradients.mean_norm)
    return TeleportReport(
        step=step,
        epoch=epoch,
        accepted=False,
        reason="",
        losses_before=losses,
        losses_after=losses.copy(),
        cosines_before=cosines,
        cosines_after=cosines.copy(),
        grad_norm_before=norm,
        grad_norm_after=norm,
        sigma=0.0,
        drift=0.0,
        seconds=0.0,
        forwards=0,
        backwards=0,
    )


def report_of_outcome(report: TeleportReport, outcome: Outcome, invariance: Invariance) -> TeleportReport:
    """The report of a teleport that is over.

    Args:
        report: The report of its start.
        outcome: Its outcome.
        invariance: Which losses it held.
    """
    told = replace(report, accepted=outcome.accepted, reason=outcome.reason, sigma=outcome.sigma, trace=outcome.trace)
    after = outcome.end
    if after is not outcome.start:
        told.losses_after = _by_task(after, outcome.start.gradients.names)
        told.drift = drift(after.losses, outcome.start.losses, invariance)
        told.cosines_after = {} if after.evaluated is None else _cosines(after.evaluated)
        told.grad_norm_after = None if after.evaluated is None else float(after.evaluated.mean_norm)
        told.reevaluated = after.evaluated is not None
    return told


def fill_in(reports: Sequence[TeleportReport], gradients: TaskGradients, step: int) -> TeleportReport | None:
    """Add the conflict after the last teleport to its report, if it was not evaluated there.

    Args:
        reports: The reports.
        gradients: The task gradients of the next check.
        step: ``trainer.global_step`` of the check.

    Returns:
        The report; ``None`` if the conflict is known already, or if nobody teleported.
    """
    if not reports or not reports[-1].accepted or reports[-1].cosines_after or not gradients.names:
        return None
    report = reports[-1]
    report.cosines_after = _cosines(gradients)
    report.grad_norm_after, report.checked_at = float(gradients.mean_norm), step
    return report


def append_report(reports: list[TeleportReport], report: TeleportReport) -> None:
    """Add a report. Only the last few keep their traces: with a teleport at every step, these outgrow the model."""
    reports.append(report)
    old = len(reports) - 1 - _TRACES_KEPT
    if old >= 0:
        reports[old] = replace(reports[old], trace=[])


def _by_task(point: Point, names: Sequence[str] | None = None) -> dict[str, float]:
    return dict(zip(point.gradients.names if names is None else names, point.losses.tolist(), strict=True))


def _cosines(gradients: TaskGradients) -> dict[str, float]:
    pairs = zip(gradients.names, gradients.norms.tolist(), gradients.cosines.tolist(), strict=True)
    return {name: cosine for name, norm, cosine in pairs if norm != 0}


def without_traces(reports: Sequence[TeleportReport]) -> list[dict[str, Any]]:
    """Reports as plain dictionaries, for a checkpoint."""
    return [{**vars(report), "trace": []} for report in reports]
