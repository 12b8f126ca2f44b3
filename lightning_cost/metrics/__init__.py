r"""What multi-task models are judged by, as functions and as torchmetrics.

:math:`\Delta m\%` and the mean rank compare methods; depth errors and angles between surface normals judge predictions.
Those are averaged over all valid pixels, or batch by batch as in published tables: the two are not comparable.
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
