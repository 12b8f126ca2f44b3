"""One teleport: search, then accept or put everything back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from lightning_cost.gradients import GradientBuffer
from lightning_cost.invariance import Invariance, drift
from lightning_cost.landscape import Landscape, Point, grads_are_finite
from lightning_cost.objectives import Objective
from lightning_cost.searches import Search, SearchContext

__all__ = ["TeleportReport", "Teleporter", "trajectory_similarity"]


_PIECE = 2**16


@dataclass
class TeleportReport:
    r"""What happened in one teleport.

    Attributes:
        step: ``trainer.global_step`` of the optimizer step that it preceded.
        epoch: ``trainer.current_epoch``.
        accepted: Whether the shared parameters were moved. If not, nothing was changed.
        reason: Why, in words.
        losses_before: Task losses on the teleport's batches where it started.
        losses_after: The same where it arrived; where it started if it was refused.
        cosines_before: Cosines :math:`\cos \phi_{i0}` of the task gradients with their mean.
        cosines_after: The same where it arrived.
        grad_norm_before: Norm of the mean gradient :math:`g_0`.
        grad_norm_after: The same where it arrived.
        sigma: Cosine of the move with the gradient before it (Eq. 12); 0 without a move.
        drift: Largest relative change of a held loss.
        seconds: Wall-clock time.
        forwards: Forward passes of a batch, the update's own included if it was accepted.
        backwards: Backward passes of a task or of a weighted sum of tasks, likewise.
        trace: What was evaluated on the way, in order: dictionaries with a ``stage`` and figures. Empty for teleports
            from before training was resumed.
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


@dataclass(frozen=True)
class Place:
    """Where the landscape has been: enough to go back.

    Attributes:
        position: The shared parameters, shape ``(P,)``.
        point: Losses and task gradients there.
        grads: ``.grad`` of every parameter of the module there.
        value: The objective there.
        buffer: Holds the task gradients; ``None`` if it is not the teleporter's.
    """

    position: Tensor
    point: Point
    grads: list[Tensor | None]
    value: float | None
    buffer: GradientBuffer | None


@dataclass(frozen=True)
class Outcome:
    """The end of a teleport.

    Attributes:
        accepted: Whether the shared parameters were moved.
        reason: Why, in words.
        start: Losses and task gradients before.
        end: The same where the landscape is now.
        sigma: Cosine of the move with the gradient before it (Eq. 12).
        update: Task gradients of the update's batches where the landscape is now; ``None`` without a move.
        undo: Goes back to where the teleport started.
    """

    accepted: bool
    reason: str
    start: Point
    end: Point
    sigma: float
    update: GradientBuffer | None
    undo: Callable[[], None]


class Teleporter:
    """Searches for another point with the same losses and accepts it only if it is one.

    Args:
        objective: What to increase.
        search: How to search.
        adapter: The adapter that bounds the change of the weights.
        invariance: Which losses to hold.
        tolerance: Largest accepted relative change of a held loss. ``None`` accepts every finite candidate, whether the
            objective grew or not, as the paper does.
    """

    def __init__(
        self,
        objective: Objective,
        search: Search,
        adapter: PeftConfig,
        invariance: Invariance,
        tolerance: float | None,
    ) -> None:
        self.objective = objective
        self.search = search
        self.adapter = adapter
        self.invariance = invariance
        self.tolerance = tolerance
        self.trace: list[dict[str, Any]] = []
        self._spares: list[GradientBuffer] = []

    def run(
        self,
        landscape: Landscape,
        update: Landscape,
        known: Point | None,
        modules: Sequence[tuple[str, nn.Module]],
        learning_rate: float,
        on_stage: Callable[[str], None],
    ) -> Outcome:
        """Teleport from where the landscape is. After a refusal or an exception, everything is as it was.

        Args:
            landscape: The losses that define the level set.
            update: The losses that the optimizer step is about to lower; often the same object.
            known: Losses and task gradients of ``landscape`` where it is, if they are known.
            modules: The shared modules by name.
            learning_rate: The learning rate of the shared parameters.
            on_stage: Told what the search is doing.

        Returns:
            The outcome. If it is accepted, ``.grad`` of every parameter belongs to ``update`` at the new point.
        """
        origin, grads = landscape.position(), landscape.grads()
        self.trace = []
        taken: list[GradientBuffer] = []

        def go_back() -> None:
            landscape.go_back(origin, grads)

        def refused(reason: str) -> Outcome:
            go_back()
            return Outcome(False, reason, point, point, 0.0, None, go_back)

        try:
            point, buffer = (known, None) if known is not None else self._evaluate(landscape, taken)
            if not (bool(torch.isfinite(point.losses).all()) and point.gradients.is_finite):
                return refused("a loss or gradient is not finite where the teleport starts")
            start = self._start(landscape, origin, point, buffer)
            reached, reason = start, "the objective has no direction on the level set"
            for _ in range(self.search.rounds):
                context = SearchContext(
                    landscape,
                    reached.point,
                    self.objective,
                    self.invariance,
                    modules,
                    self.adapter,
                    learning_rate,
                    self._recorder(on_stage),
                )
                place, reason = self._first_accepted(context, start, reached, taken, reason)
                if place is None:
                    break
                reached = place
            if reached is start:
                return refused(reason)
            landscape.go_back(reached.position, reached.grads)
            buffer = reached.buffer
            if update is not landscape:
                buffer = self._take(taken)
                buffer.restart(reached.point.gradients, reached.point.losses.tolist())
                new = update.point(buffer)
                assert new is not None
                if not (new.gradients.is_finite and grads_are_finite(update.module)):
                    return refused("a gradient of the update is not finite")
            assert buffer is not None
            taken.remove(buffer)
            sigma = trajectory_similarity(reached.position - origin, start.point.gradients.mean)
            return Outcome(True, "accepted", start.point, reached.point, sigma, buffer, go_back)
        except BaseException:
            go_back()
            raise
        finally:
            self._spares += taken

    def clear(self) -> None:
        """Give up the buffers that are kept for the next teleport."""
        self._spares = []

    def recycle(self, buffer: GradientBuffer) -> None:
        """Take back a buffer that is no longer needed."""
        self._spares.append(buffer)

    def _evaluate(self, landscape: Landscape, taken: list[GradientBuffer]) -> tuple[Point, GradientBuffer]:
        buffer = self._take(taken)
        buffer.restart()
        point = landscape.point(buffer)
        assert point is not None
        return point, buffer

    def _start(self, landscape: Landscape, position: Tensor, point: Point, buffer: GradientBuffer | None) -> Place:
        self.objective.begin(landscape, point)
        value = self.objective.value(landscape, point)
        self._record("start", losses=point.losses, drift=0.0, objective=value)
        return Place(position, point, landscape.grads(), value, buffer)

    def _first_accepted(
        self, context: SearchContext, start: Place, reached: Place, taken: list[GradientBuffer], reason: str
    ) -> tuple[Place | None, str]:
        """The first candidate that passes, or ``None`` and why the last one did not."""
        landscape = context.landscape
        buffer = self._take(taken)
        refusal = ""

        def admits(losses: Tensor) -> bool:
            nonlocal refusal
            refusal = self._loss_refusal(losses, start.point.losses)
            context.record("candidate", losses=losses, drift=drift(losses, start.point.losses, self.invariance))
            return not refusal

        for _ in self.search.candidates(context):
            buffer.restart(reached.point.gradients, reached.point.losses.tolist())
            point = landscape.point(buffer, admits)
            if point is not None:
                value = self.objective.value(landscape, point)
                self.trace[-1]["objective"] = value
                refusal = self._objective_refusal(value, reached.value)
                if not refusal and not grads_are_finite(landscape.module):
                    refusal = "a gradient is not finite at the candidate"
                if landscape.ranks.agree(not refusal):
                    return Place(landscape.position(), point, landscape.grads(), value, buffer), "accepted"
            reason = refusal
        return None, reason

    def _loss_refusal(self, losses: Tensor, reference: Tensor) -> str:
        if not bool(torch.isfinite(losses).all()):
            return "a loss is not finite at the candidate"
        largest = drift(losses, reference, self.invariance)
        if self.tolerance is not None and not largest <= self.tolerance:
            return f"a loss drifts by {largest:.2%}, over the tolerance of {self.tolerance:.2%}"
        return ""

    def _objective_refusal(self, value: float | None, before: float | None) -> str:
        if value is None or before is None:
            return ""
        if not math.isfinite(value):
            return "the objective is not finite at the candidate"
        if self.tolerance is not None and not value > before:
            return f"the objective does not grow ({before:.4g} to {value:.4g})"
        return ""

    def _take(self, taken: list[GradientBuffer]) -> GradientBuffer:
        buffer = self._spares.pop() if self._spares else GradientBuffer()
        taken.append(buffer)
        return buffer

    def _recorder(self, on_stage: Callable[[str], None]) -> Callable[..., None]:
        def record(stage: str, **figures: Any) -> None:
            on_stage(stage)
            self._record(stage, **figures)

        return record

    def _record(self, stage: str, **figures: Any) -> None:
        plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in figures.items()}
        self.trace.append({"stage": stage, **plain})


def trajectory_similarity(move: Tensor, gradient: Tensor) -> float:
    r"""The similarity :math:`\sigma = \cos(\Delta\theta, g')` of a move and the gradient before it (Eq. 12).

    Args:
        move: Change :math:`\Delta\theta` of the shared parameters, shape ``(P,)``.
        gradient: Gradient :math:`g'` before the teleport, shape ``(P,)``: the one of the mean loss.

    Returns:
        A number in [-1, 1]; 0 if either vector is zero. A move on the level set is orthogonal to the gradient.

    Example:
        >>> round(trajectory_similarity(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), 4)
        0.7071
    """
    products = torch.zeros(3, dtype=torch.float64, device=move.device)
    # In pieces: a copy of the whole vectors in double precision would take longer than all the rest.
    for short_move, short_gradient in zip(move.split(_PIECE), gradient.split(_PIECE), strict=True):
        m, g = short_move.double(), short_gradient.double()
        products += torch.stack([m @ g, m @ m, g @ g])
    product, move_square, gradient_square = products.tolist()
    if move_square == 0 or gradient_square == 0:
        return 0.0
    cosine: float = product / math.sqrt(move_square) / math.sqrt(gradient_square)
    return min(max(cosine, -1.0), 1.0)
