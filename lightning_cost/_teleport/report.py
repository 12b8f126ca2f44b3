"""What happened in one teleport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_cost._teleport.run import Outcome
from lightning_cost.gradients import TaskGradients
from lightning_cost.invariance import Invariance, drift

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
        cosines_after: The same where it arrived.
        grad_norm_before: Norm of the mean gradient :math:`g_0` where it started.
        grad_norm_after: The same where it arrived.
        sigma: Cosine of the move with the gradient before it (Eq. 12); 0 without a move.
        drift: Largest relative change of a held loss.
        seconds: Wall-clock time.
        forwards: Forward passes of a micro-batch, those at the new point included.
        backwards: Backward passes of a task or of a weighted sum of tasks, those at the new point included.
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
    grad_norm_after: float
    sigma: float
    drift: float
    seconds: float
    forwards: int
    backwards: int
    trace: list[dict[str, Any]] = field(default_factory=list)


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
        cosine_after: The same where they arrived.
    """

    epoch: int = -1
    checks: int = 0
    conflicts: int = 0
    tried: int = 0
    accepted: int = 0
    drift: float = 0.0
    cosine_before: float = 0.0
    cosine_after: float = 0.0

    def count(self, report: TeleportReport) -> None:
        """Count a teleport that was tried, if it was accepted."""
        if report.accepted:
            self.accepted += 1
            self.drift += report.drift
            self.cosine_before += min(report.cosines_before.values())
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
            means = {name: getattr(self, name) / self.accepted for name in ("drift", "cosine_before", "cosine_after")}
            found |= {f"cost/{name}": mean for name, mean in means.items()}
        return found


def make_report(outcome: Outcome, invariance: Invariance, step: int, epoch: int, seconds: float) -> TeleportReport:
    """The report of a teleport.

    Args:
        outcome: Its outcome.
        invariance: Which losses it held.
        step: ``trainer.global_step``.
        epoch: ``trainer.current_epoch``.
        seconds: Wall-clock time.
    """
    before, after, names = outcome.start, outcome.end, outcome.start.gradients.names

    def by_task(values: Tensor) -> dict[str, float]:
        return dict(zip(names, values.tolist(), strict=True))

    def cosines(gradients: TaskGradients) -> dict[str, float]:
        norms = by_task(gradients.norms)
        return {name: cosine for name, cosine in by_task(gradients.cosines).items() if norms[name] != 0}

    return TeleportReport(
        step=step,
        epoch=epoch,
        accepted=outcome.accepted,
        reason=outcome.reason,
        losses_before=by_task(before.losses),
        losses_after=by_task(after.losses),
        cosines_before=cosines(before.gradients),
        cosines_after=cosines(after.gradients),
        grad_norm_before=float(before.gradients.mean_norm),
        grad_norm_after=float(after.gradients.mean_norm),
        sigma=outcome.sigma,
        drift=drift(after.losses, before.losses, invariance),
        seconds=seconds,
        forwards=outcome.forwards,
        backwards=outcome.backwards,
        trace=outcome.trace,
    )


def append_report(reports: list[TeleportReport], report: TeleportReport) -> None:
    """Add a report. Only the last few keep their traces: with a teleport at every step, these outgrow the model."""
    reports.append(report)
    old = len(reports) - 1 - _TRACES_KEPT
    if old >= 0:
        reports[old] = replace(reports[old], trace=[])


def without_traces(reports: Sequence[TeleportReport]) -> list[dict[str, Any]]:
    """Reports as plain dictionaries, for a checkpoint."""
    return [{**vars(report), "trace": []} for report in reports]
