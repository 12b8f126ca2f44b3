"""Multi-task learning with symmetry teleportation in PyTorch Lightning."""

from lightning_cost._teleport.report import TeleportReport
from lightning_cost._teleport.run import Outcome, Teleporter
from lightning_cost.callback import SymmetryTeleportCallback
from lightning_cost.gradients import TaskGradients
from lightning_cost.methods import ScaleInvariant
from lightning_cost.mixin import MultiTaskMixin
from lightning_cost.monitor import ConflictMonitor, ConflictSummary
from lightning_cost.objectives import (
    ConflictAlignment,
    GradientNorm,
    Objective,
    RandomDirection,
    Reversed,
    SampledSharpness,
)
from lightning_cost.searches import LevelSetSearch, PenaltySearch, Search, SearchContext
from lightning_cost.surface import Point, Surface
from lightning_cost.triggers import DominatedConflict, Majority, Trigger

__version__ = "0.1.0"

__all__ = [
    "ConflictAlignment",
    "ConflictMonitor",
    "ConflictSummary",
    "DominatedConflict",
    "GradientNorm",
    "LevelSetSearch",
    "Majority",
    "MultiTaskMixin",
    "Objective",
    "Outcome",
    "PenaltySearch",
    "Point",
    "RandomDirection",
    "Reversed",
    "SampledSharpness",
    "ScaleInvariant",
    "Search",
    "SearchContext",
    "Surface",
    "SymmetryTeleportCallback",
    "TaskGradients",
    "TeleportReport",
    "Teleporter",
    "Trigger",
]
