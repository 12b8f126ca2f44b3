r"""Metrics of multi-task models, as functions and as torchmetrics metrics.

:math:`\Delta m\%` and the mean rank compare methods. Depth errors and angles between surface normals compare
predictions with labels. You can average these over all valid pixels, or batch by batch as published tables do. The two
averages are not comparable.
"""

from lightning_cost.metrics._comparison import DeltaM, MeanRank, delta_m, mean_rank
from lightning_cost.metrics._depth import AbsoluteDepthError, RelativeDepthError, depth_error
from lightning_cost.metrics._normals import MeanNormalAngle, MedianNormalAngle, NormalsWithin, normal_angles

__all__ = [
    "AbsoluteDepthError",
    "DeltaM",
    "MeanNormalAngle",
    "MeanRank",
    "MedianNormalAngle",
    "NormalsWithin",
    "RelativeDepthError",
    "delta_m",
    "depth_error",
    "mean_rank",
    "normal_angles",
]
