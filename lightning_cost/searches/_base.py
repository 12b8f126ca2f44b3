"""What every search has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import Parameter

from lightning_cost.invariance import Invariance
from lightning_cost.objectives import Objective
from lightning_cost.surface import Point, Surface

__all__ = ["Search", "SearchContext"]


@dataclass(frozen=True)
class SearchContext:
    """What a search works with.

    Attributes:
        surface: The losses. The surface is at ``start``.
        start: The point to leave.
        origin: Its position, shape ``(P,)``. Do not write into it.
        objective: What to increase.
        invariance: Which losses to hold.
        modules: The shared modules by name.
        learning_rate: The learning rate of the shared parameters in the optimizer.
        tolerance: Largest accepted drift; ``None`` for no limit.
        drifts: The drifts of the candidates so far.
        record: Adds a named row of figures to the trace of the teleport. If the search ends after a row with a
            ``reason``, this is the reason of the report.
    """

    surface: Surface
    start: Point
    origin: Tensor
    objective: Objective
    invariance: Invariance
    modules: Mapping[str, nn.Module]
    learning_rate: float
    record: Callable[..., None]
    tolerance: float | None = None
    drifts: list[float] = field(default_factory=list)


class Search(ABC):
    """A way to find points with the same losses and a larger objective."""

    rounds: int = 1
    """How often to search again, each time from the point that was accepted last."""

    uses_aim: bool = True
    """Whether the search asks the objective what to aim at (:meth:`~lightning_cost.objectives.Objective.aim`)."""

    @abstractmethod
    def candidates(self, context: SearchContext) -> Iterator[None]:
        """Move the surface from one candidate to the next, the most ambitious first, and yield at each.

        The teleport stops the iteration at the first candidate that it accepts. If it accepts none, it restores the
        parameters: a search need not.
        """

    @abstractmethod
    def reach(self, modules: Mapping[str, nn.Module], shared: Sequence[Parameter]) -> Sequence[Parameter]:
        """The shared parameters that the search can take a step in, at least one.

        Args:
            modules: The shared modules by name.
            shared: The shared parameters.

        Raises:
            ValueError: If it reaches none.
        """

    def is_target(self, name: str, module: nn.Module) -> bool:
        """Whether the search is meant to change the weights of a module, which is given by its dotted name."""
        return True
