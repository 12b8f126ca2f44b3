"""One teleport: search, then accept or put everything back."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_cost._arguments import (
    check_bool,
    check_choice,
    check_effect,
    check_floating,
    check_instance,
    check_integer,
    check_not_negative,
    check_positive,
    check_same_shape,
    check_shape,
    describe,
)
from lightning_cost.invariance import Invariance, drift
from lightning_cost.objectives import ConflictAlignment, Objective, Reversed, checked_value
from lightning_cost.searches import LevelSetSearch, Search, SearchContext
from lightning_cost.surface import Point, Surface

__all__ = ["Outcome", "Teleporter"]

_PIECE = 2**16


@dataclass(frozen=True)
class Outcome:
    """The end of a teleport.

    Attributes:
        accepted: Whether the shared parameters were moved.
        reason: Why, in words.
        start: Losses and task gradients where it started.
        end: The same where the surface is now.
        sigma: Cosine of the move with the gradient before it (Eq. 12); 0 without a move.
        forwards: Forward passes of the teleport.
        backwards: Its backward passes.
        trace: What was evaluated on the way, in order.
        undo: Goes back to where the teleport started.
    """

    accepted: bool
    reason: str
    start: Point
    end: Point
    sigma: float = 0.0
    forwards: int = 0
    backwards: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)
    undo: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class _Place:
    """A point that may be left, with what is needed to come back."""

    point: Point
    grads: list[Tensor | None]
    value: float | None


class Teleporter:
    """Moves to another point with the same losses, or changes nothing.

    The callback runs one in a Trainer. It needs no Trainer itself: give it a :class:`~lightning_cost.surface.Surface`.

    Args:
        objective: What to increase.
        search: How to search.
        invariance: Which losses to hold: the loss of each task (``"per_task"``) or their ``"mean"``.
        tolerance: Largest accepted relative change of a held loss. ``None`` accepts every finite candidate, even if the
            objective did not grow, as the paper does.
        reevaluate: Whether to evaluate the task gradients at a candidate, so that the objective must have grown and the
            step goes on with them. Otherwise a candidate is accepted by its losses alone, which takes a forward pass,
            and the gradients of the point that was left stay in ``.grad``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from torch import nn
        >>> from lightning_cost.surface import Surface
        >>> generator = torch.Generator().manual_seed(0)
        >>> inputs, left, right = (torch.randn(16, n, generator=generator) for n in (3, 1, 1))
        >>> _ = torch.manual_seed(0)
        >>> backbone, heads = nn.Linear(3, 4), nn.Linear(4, 2)
        >>> def losses():
        ...     output = heads(backbone(inputs).tanh())
        ...     return {
        ...         "left": (output[:, :1] - left).square().mean(),
        ...         "right": (output[:, 1:] - right).square().mean(),
        ...     }
        >>> outcome = Teleporter().run(Surface(losses, list(backbone.parameters())), {"backbone": backbone})
        >>> outcome.accepted
        True
    """

    def __init__(
        self,
        objective: Objective | None = None,
        search: Search | None = None,
        invariance: Invariance = "per_task",
        tolerance: float | None = 0.02,
        reevaluate: bool = True,
    ) -> None:
        if objective is not None and not isinstance(objective, Objective):
            raise ValueError(f"`objective` must be an Objective; got {objective!r}.")
        if search is not None and not isinstance(search, Search):
            raise ValueError(f"`search` must be a Search; got {search!r}.")
        check_choice("invariance", invariance, get_args(Invariance))
        if tolerance is not None:
            check_positive("tolerance", tolerance)
        self.objective = ConflictAlignment() if objective is None else objective
        self.search = LevelSetSearch() if search is None else search
        kinds = type(self.objective).__name__, type(self.search).__name__
        check_bool(f"{kinds[0]}.uses_task_gradients", self.objective.uses_task_gradients)
        check_bool(f"{kinds[1]}.uses_aim", self.search.uses_aim)
        check_integer(f"{kinds[1]}.rounds", self.search.rounds, 0)
        aiming = self.objective
        while isinstance(aiming, Reversed):
            aiming = aiming.objective
        if not self.search.uses_aim and isinstance(aiming, ConflictAlignment):
            check_effect("target", aiming.target, ConflictAlignment().target, f"with {kinds[1]}")
        check_bool("reevaluate", reevaluate)
        if not reevaluate and self.search.rounds > 1:
            raise ValueError(
                f"`reevaluate=False` takes one step from the task gradients at hand, but {self.search!r} takes"
                f" {self.search.rounds}. Pass a search with one step."
            )
        self.invariance = invariance
        self.tolerance = tolerance
        self.reevaluate = reevaluate
        self._spares: list[Tensor] = []

    def run(
        self,
        surface: Surface,
        modules: Mapping[str, nn.Module],
        start: Point | None = None,
        learning_rate: float = 1e-3,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> Outcome:
        """Teleport from where the surface is.

        After a refusal or an exception, the parameters and ``.grad`` are as they were. What else the losses change when
        they are evaluated, such as running statistics and random states, is yours to restore. The callback does that.

        Args:
            surface: The losses.
            modules: The shared modules by name.
            start: Losses and task gradients where the surface is, if they are known. ``.grad`` must belong to them.
            learning_rate: The learning rate of the shared parameters, which a search may use.
            on_stage: Called with what the search is doing.

        Returns:
            The outcome. If it is accepted, ``.grad`` of every parameter belongs to the new point; with
            ``reevaluate=False`` it is what it was.

        Raises:
            TypeError: If an argument is of a wrong class.
            ValueError: If ``start`` does not fit the surface, or ``learning_rate`` is negative or not finite.
        """
        _check_run(surface, modules, start, learning_rate, on_stage)
        attempt = _Attempt(self, surface, modules, learning_rate, on_stage)
        try:
            with torch.enable_grad():
                return attempt.run(start)
        except BaseException:
            attempt.go_back()
            raise

    def take_spare(self) -> Tensor | None:
        """A matrix whose memory may be reused, if there is one."""
        return self._spares.pop() if self._spares else None

    def recycle(self, matrix: Tensor) -> None:
        """Take a matrix of task gradients that is no longer needed, to reuse its memory in the next teleport."""
        check_floating("matrix", matrix)
        self._spares.append(matrix)

    def clear(self) -> None:
        """Free the memory that is kept for the next teleport."""
        self._spares = []


class _Attempt:
    """One run of a :class:`Teleporter`. It knows where the teleport started, and where it is if it moved."""

    def __init__(
        self,
        teleporter: Teleporter,
        surface: Surface,
        modules: Mapping[str, nn.Module],
        learning_rate: float,
        on_stage: Callable[[str], None],
    ) -> None:
        self._teleporter = teleporter
        self._surface = surface
        self._modules = modules
        self._learning_rate = learning_rate
        self._on_stage = on_stage
        # At most two copies of the shared parameters: where it started, and where the last accepted step led.
        self._origin = surface.position()
        self._position = self._origin
        self._grads = surface.grads()
        self._passes = surface.forwards, surface.backwards
        self._trace: list[dict[str, Any]] = []

    def go_back(self) -> None:
        """Go back to where the teleport started."""
        self._surface.go_back(self._origin, self._grads)

    def run(self, known: Point | None) -> Outcome:
        """See :meth:`Teleporter.run`. An exception leaves the surface where it is."""
        surface, objective = self._surface, self._teleporter.objective
        point = surface.point(spare=self._teleporter.take_spare()) if known is None else known
        if not (bool(torch.isfinite(point.losses).all()) and point.gradients.is_finite):
            return self._refused(point, "a loss or gradient is not finite where the teleport starts")
        grads = surface.grads()
        objective.begin(surface, point)
        value = checked_value(objective, surface, point) if self._teleporter.reevaluate else None
        self._record("start", losses=point.losses, drift=0.0, objective=value)
        start = reached = _Place(point, grads, value)
        reason = ""
        for _ in range(self._teleporter.search.rounds):
            place, reason = self._first_accepted(start, reached)
            if place is None:
                if reached is not start:
                    surface.go_back(self._position, reached.grads)
                break
            if reached is not start:
                self._teleporter.recycle(reached.point.gradients.matrix)
            reached = place
        if reached is start:
            return self._refused(point, reason)
        surface.set_grads(reached.grads)
        move = self._position.sub_(self._origin)
        sigma = trajectory_similarity(move, point.gradients.mean)
        return self._outcome(True, "accepted", point, reached.point, sigma)

    def _first_accepted(self, start: _Place, reached: _Place) -> tuple[_Place | None, str]:
        """The first candidate that passes, or ``None`` and why the last one did not."""
        surface, objective = self._surface, self._teleporter.objective
        context = SearchContext(
            surface,
            reached.point,
            self._position,
            objective,
            self._teleporter.invariance,
            self._modules,
            self._learning_rate,
            self._record,
            self._teleporter.tolerance,
        )
        reason = refusal = "the objective has no direction on the level set"
        reevaluate = self._teleporter.reevaluate
        spare = self._teleporter.take_spare() if reevaluate else None

        def admit(losses: Tensor) -> bool:
            nonlocal refusal
            change = drift(losses, start.point.losses, self._teleporter.invariance)
            context.drifts.append(change)
            refusal = self._loss_refusal(losses, change)
            self._record("candidate", losses=losses, drift=change)
            return not refusal

        candidates: Any = self._teleporter.search.candidates(context)
        if not isinstance(candidates, Iterator):
            name = type(self._teleporter.search).__name__
            raise TypeError(f"`{name}.candidates` must yield at each candidate; got {describe(candidates)}.")
        for _ in candidates:
            if not reevaluate:
                losses = surface.losses()
                if surface.ranks.agree(admit(losses)):
                    self._accept(candidates)
                    return _Place(Point(losses), self._grads, None), "accepted"
                reason = refusal
                continue
            point = surface.point_if(admit, reached.point, spare)
            if point is not None:
                spare = point.gradients.matrix
                grads, finite = surface.grads(), point.gradients.is_finite and surface.grads_are_finite()
                value = checked_value(objective, surface, point)
                self._trace[-1]["objective"] = value
                refusal = self._objective_refusal(value, reached.value)
                if not refusal and not finite:
                    refusal = "a gradient is not finite at the candidate"
                if surface.ranks.agree(not refusal):
                    self._accept(candidates)
                    return _Place(point, grads, value), "accepted"
            reason = refusal
        if spare is not None:
            self._teleporter.recycle(spare)
        return None, self._trace[-1].get("reason", reason)

    def _accept(self, candidates: Iterator[None]) -> None:
        """Stay where the surface is, even if the search moves it when it is stopped."""
        first = self._position is self._origin
        self._position = self._surface.position(out=None if first else self._position)
        if isinstance(candidates, Generator):
            candidates.close()
            self._surface.move_to(self._position)

    def _refused(self, point: Point, reason: str) -> Outcome:
        self.go_back()
        return self._outcome(False, reason, point, point)

    def _outcome(self, accepted: bool, reason: str, start: Point, end: Point, sigma: float = 0.0) -> Outcome:
        forwards, backwards = self._passes
        surface = self._surface
        return Outcome(
            accepted,
            reason,
            start,
            end,
            sigma,
            surface.forwards - forwards,
            surface.backwards - backwards,
            self._trace,
            self.go_back,
        )

    def _loss_refusal(self, losses: Tensor, largest: float) -> str:
        if not bool(torch.isfinite(losses).all()):
            return "a loss is not finite at the candidate"
        tolerance = self._teleporter.tolerance
        if tolerance is not None and not largest <= tolerance:
            return f"a loss drifts by {largest:.2%}, over the tolerance of {tolerance:.2%}"
        return ""

    def _objective_refusal(self, value: float | None, before: float | None) -> str:
        if value is None or before is None:
            return ""
        if not math.isfinite(value):
            return "the objective is not finite at the candidate"
        if self._teleporter.tolerance is not None and not value > before:
            return f"the objective does not grow ({before:.4g} to {value:.4g})"
        return ""

    def _record(self, stage: str, **figures: Any) -> None:
        self._on_stage(stage)
        plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in figures.items()}
        self._trace.append({"stage": stage, **plain})


def _check_run(surface: object, modules: object, start: object, learning_rate: float, on_stage: object) -> None:
    check_instance("surface", surface, Surface, "a Surface")
    assert isinstance(surface, Surface)
    named = "the shared modules by name, such as {'backbone': module.backbone}"
    check_instance("modules", modules, Mapping, named)
    assert isinstance(modules, Mapping)
    for name, module in modules.items():
        check_instance("modules", name, str, f"{named}, whose keys are strings")
        check_instance(f"modules[{name!r}]", module, nn.Module, "a torch.nn.Module")
    if start is not None:
        check_instance("start", start, Point, "a Point with task gradients, such as `surface.point()`, or None")
        assert isinstance(start, Point)
        num_tasks, size = len(start.gradients.names), surface.num_parameters
        check_shape("start.losses", start.losses, (num_tasks,), f"one for each of {list(start.gradients.names)}")
        check_shape("start.gradients.matrix", start.gradients.matrix, (num_tasks, size), "for the surface")
    check_not_negative("learning_rate", learning_rate)
    check_instance("on_stage", on_stage, Callable, "a function of the stage")


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
    check_same_shape("gradient", gradient, "move", move)
    check_shape("move", move, (move.numel(),), "a vector")
    products = torch.zeros(3, dtype=torch.float64, device=move.device)
    # In pieces: a copy of the whole vectors in double precision would take longer than everything else.
    for short_move, short_gradient in zip(move.split(_PIECE), gradient.split(_PIECE), strict=True):
        m, g = short_move.double(), short_gradient.double()
        products += torch.stack([m @ g, m @ m, g @ g])
    product, move_square, gradient_square = products.tolist()
    if move_square == 0 or gradient_square == 0:
        return 0.0
    cosine: float = product / math.sqrt(move_square) / math.sqrt(gradient_square)
    return min(max(cosine, -1.0), 1.0)
