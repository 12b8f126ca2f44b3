"""What every search has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from peft import PeftConfig
from torch import nn
from torch.nn import Parameter

from lightning_cost.invariance import Invariance
from lightning_cost.landscape import Landscape, Point
from lightning_cost.objectives import Objective

__all__ = ["Search", "SearchContext"]


@dataclass(frozen=True)
class SearchContext:
    """What a search works with.

    Attributes:
        landscape: The losses. It is at ``start``.
        start: The point to leave.
        objective: What to increase.
        invariance: Which losses to hold.
        modules: The shared modules by name.
        adapter: The adapter that bounds the change of the weights.
        learning_rate: The learning rate of the shared parameters in the optimizer.
        record: Adds a named row of figures to the trace of the teleport.
    """

    landscape: Landscape
    start: Point
    objective: Objective
    invariance: Invariance
    modules: Sequence[tuple[str, nn.Module]]
    adapter: PeftConfig
    learning_rate: float
    record: Callable[..., None]


class Search(ABC):
    """A way to find points with the same losses and a larger objective."""

    rounds: int = 1
    """How often to search again from the point that was accepted."""

    @abstractmethod
    def candidates(self, context: SearchContext) -> Iterator[None]:
        """Move the landscape to one candidate after the other, the most ambitious first, and yield at each.

        The teleport ends the iteration at the first candidate that it accepts. It restores the parameters if it accepts
        none, so that a search need not.
        """

    @abstractmethod
    def reach(
        self, modules: Sequence[tuple[str, nn.Module]], shared: Sequence[Parameter], adapter: PeftConfig
    ) -> Sequence[Parameter]:
        """The shared parameters that the search can take a step in, at least one.

        Raises:
            ValueError: If the search cannot work with the adapter, or if it reaches none.
        """
