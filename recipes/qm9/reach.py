"""Teleports that change a part of the network only, for studies of how far an adapter must reach.

`python -m recipes.study qm9 --problem small --callbacks COST recipes.qm9.reach:ends --seeds 3`
"""

from __future__ import annotations

from lightning_cost import LevelSetSearch, SymmetryTeleportCallback
from recipes.common.problem import Problem

__all__ = ["ENDS", "NO_RECURRENT_CELLS", "ends", "no_recurrent_cells"]

ENDS = ("embedding", "out")
"""The two Linear layers at the ends."""

NO_RECURRENT_CELLS = (*ENDS, "edge_in", "edge_out", "root")
"""What PEFT reaches in the usual network, whose recurrent cells are no Linear layers."""


def ends(problem: Problem, seed: int) -> SymmetryTeleportCallback:
    """COST on the two Linear layers at the ends."""
    return SymmetryTeleportCallback(seed=seed, search=LevelSetSearch(target_modules=ENDS))


def no_recurrent_cells(problem: Problem, seed: int) -> SymmetryTeleportCallback:
    """COST on all layers but the recurrent cells."""
    return SymmetryTeleportCallback(seed=seed, search=LevelSetSearch(target_modules=NO_RECURRENT_CELLS))
