"""How to reach another point of the level set."""

from lightning_cost.searches._base import Search, SearchContext
from lightning_cost.searches._level_set import LevelSetSearch
from lightning_cost.searches._penalty import PenaltySearch

__all__ = ["LevelSetSearch", "PenaltySearch", "Search", "SearchContext"]
