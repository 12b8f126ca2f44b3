"""Multi-task learning with symmetry teleportation in PyTorch Lightning."""

from lightning_cost.callback import SymmetryTeleportCallback
from lightning_cost.gradients import TaskGradients
from lightning_cost.methods import ScaleInvariant
from lightning_cost.mixin import MultiTaskMixin
from lightning_cost.objectives import (
    ConflictAlignment,
    GradientNorm,
    Objective,
    RandomDirection,
    Reversed,
    SampledSharpness,
)
from lightning_cost.searches import LevelSetSearch, PenaltySearch, Search
from lightning_cost.teleport import TeleportReport

__version__ = "0.1.0"

__all__ = [
    "ConflictAlignment",
    "GradientNorm",
    "LevelSetSearch",
    "MultiTaskMixin",
    "Objective",
    "PenaltySearch",
    "RandomDirection",
    "Reversed",
    "SampledSharpness",
    "ScaleInvariant",
    "Search",
    "SymmetryTeleportCallback",
    "TaskGradients",
    "TeleportReport",
]
