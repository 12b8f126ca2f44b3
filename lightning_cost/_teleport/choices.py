"""Objectives and searches by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning_cost._arguments import check_choice
from lightning_cost.objectives import ConflictAlignment, GradientNorm, Objective, SampledSharpness
from lightning_cost.searches import LevelSetSearch, PenaltySearch, Search

__all__: list[str] = []

ObjectiveName = Literal["conflict", "sharpness", "gradient_norm"]
SearchName = Literal["level_set", "penalty"]

_OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "conflict": ConflictAlignment,
    "sharpness": SampledSharpness,
    "gradient_norm": GradientNorm,
}
_SEARCHES: dict[str, Callable[[], Search]] = {"level_set": LevelSetSearch, "penalty": PenaltySearch}


def choose_objective(objective: ObjectiveName | Objective, reevaluate: bool) -> Objective:
    """An objective by its name, in the form that suits the mode of the callback.

    Raises:
        ValueError: If there is no such objective.
    """
    if isinstance(objective, Objective):
        return objective
    check_choice("objective", objective, _OBJECTIVES, "an Objective")
    if objective == "conflict" and not reevaluate:
        return ConflictAlignment(terms="mean")
    return _OBJECTIVES[objective]()


def choose_search(search: SearchName | Search, reevaluate: bool) -> Search:
    """A search by its name, in the form that suits the mode of the callback.

    Raises:
        ValueError: If there is no such search.
    """
    if isinstance(search, Search):
        return search
    check_choice("search", search, _SEARCHES, "a Search")
    if search == "level_set" and not reevaluate:
        # One step of the price of two plain ones: no decomposition of matrices, one more try at most.
        return LevelSetSearch(full_rank=True, backtracks=1, shrink=None)
    return _SEARCHES[search]()
