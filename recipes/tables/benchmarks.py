"""The benchmarks of the paper, their columns, and the rows that it published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from recipes.celeba.attributes import ATTRIBUTES
from recipes.qm9.targets import BENCHMARK, TARGETS

__all__ = ["BENCHMARKS", "Benchmark", "Column"]


@dataclass(frozen=True)
class Column:
    """A metric in a table.

    Attributes:
        metric: Its name in the results of a run.
        title: Its title.
        higher_is_better: Its direction.
        factor: What the table multiplies it by.
        digits: Decimals.
    """

    metric: str
    title: str
    higher_is_better: bool = False
    factor: float = 1.0
    digits: int = 2


@dataclass(frozen=True)
class Benchmark:
    """One of the benchmarks.

    Attributes:
        title: What it is, and the table of the paper.
        columns: The metrics that count for Δm and the mean rank.
        shown: How many of them a table shows, from the left.
        epochs: Length of a training by the protocol.
        num_tasks: Number of tasks, for the methods that need it.
        last_epochs: Whether a run reports the mean of its last ten validations. Otherwise it reports the test of its
            best validation.
        needs_data: Whether the user must give a folder.
        published: Row to what the paper published: the shown columns, the mean rank among its rows, and Δm%; None
            where it has no number.
    """

    title: str
    columns: tuple[Column, ...]
    shown: int
    epochs: int
    num_tasks: int
    last_epochs: bool
    needs_data: bool
    published: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)


def _without_metrics(rows: Mapping[str, tuple[float, float]], shown: int) -> dict[str, tuple[float | None, ...]]:
    return {name: (*[None] * shown, *figures) for name, figures in rows.items()}


_SEGMENTATION = (Column("miou", "mIoU", True, 100), Column("pixel_accuracy", "pixel acc.", True, 100))
_CITYSCAPES = (
    *_SEGMENTATION,
    Column("absolute_error", "abs. err.", digits=4),
    Column("relative_error", "rel. err."),
)
_NYUV2 = (
    *_SEGMENTATION,
    Column("absolute_error", "abs. err.", digits=4),
    Column("relative_error", "rel. err.", digits=4),
    Column("mean_angle", "mean"),
    Column("median_angle", "median"),
    *(Column(f"within_{n}", f"< {t}", True, 100) for n, t in ((11, "11.25"), (22, "22.5"), (30, "30"))),
)

BENCHMARKS = {
    "cityscapes": Benchmark(
        title="CityScapes (Tables 1 and 5)",
        columns=_CITYSCAPES,
        shown=4,
        epochs=200,
        num_tasks=2,
        last_epochs=True,
        needs_data=True,
        published={
            "Independent": (74.01, 93.16, 0.0125, 27.77, None, None),
            "LS": (75.18, 93.49, 0.0155, 46.77, 8.25, 22.60),
            "RLW": (74.57, 93.41, 0.0158, 47.79, 11.00, 24.37),
            "DWA": (75.24, 93.52, 0.0160, 44.37, 8.25, 21.43),
            "UW": (72.02, 92.85, 0.0140, 30.13, 7.50, 5.88),
            "MGDA": (68.84, 91.54, 0.0309, 33.50, 11.00, 44.14),
            "GradDrop": (75.27, 93.53, 0.0157, 47.54, 7.75, 23.67),
            "PCGrad": (75.13, 93.48, 0.0154, 42.07, 8.50, 18.21),
            "CAGrad": (75.16, 93.48, 0.0141, 37.60, 7.50, 11.58),
            "IMTL": (75.33, 93.49, 0.0135, 38.41, 5.75, 11.04),
            "Nash-MTL": (75.41, 93.66, 0.0129, 35.02, 3.00, 6.82),
            "FAMO": (74.54, 93.29, 0.0145, 32.59, 8.25, 8.13),
            "FairGrad": (75.72, 93.68, 0.0134, 32.25, 2.25, 5.18),
            "FairGrad + COST": (75.73, 93.53, 0.0133, 31.53, 2.00, 4.30),
            "CAGrad + COST": (75.46, 93.57, 0.0134, 35.68, None, 8.37),
            # Of another implementation, without COST at 9.89.
            "Nash-MTL + COST": (75.70, 93.56, 0.0134, 34.34, None, 7.15),
        },
    ),
    "nyuv2": Benchmark(
        title="NYUv2 (Table 2)",
        columns=_NYUV2,
        shown=9,
        epochs=200,
        num_tasks=3,
        last_epochs=True,
        needs_data=True,
        published={
            "Independent": (38.30, 63.76, 0.68, 0.28, 25.01, 19.21, 30.14, 57.20, 69.15, None, None),
            "LS": (39.29, 65.33, 0.55, 0.23, 28.15, 23.96, 22.09, 47.50, 61.08, 9.44, 5.46),
            "RLW": (37.17, 63.77, 0.58, 0.24, 28.27, 24.18, 22.26, 47.05, 60.62, 12.22, 7.67),
            "DWA": (39.11, 65.31, 0.55, 0.23, 27.61, 23.18, 24.17, 50.18, 62.39, 8.56, 3.49),
            "UW": (36.87, 63.17, 0.54, 0.23, 27.04, 22.61, 23.54, 49.05, 63.65, 8.78, 4.01),
            "MGDA": (30.47, 59.90, 0.61, 0.26, 24.88, 19.45, 29.18, 56.88, 69.36, 7.11, 1.47),
            "GradDrop": (39.39, 65.12, 0.55, 0.23, 27.48, 22.96, 23.38, 49.44, 62.87, 8.89, 3.61),
            "PCGrad": (38.06, 64.64, 0.56, 0.23, 27.41, 22.80, 23.86, 49.83, 63.14, 9.33, 3.83),
            "CAGrad": (39.79, 65.49, 0.55, 0.23, 26.31, 21.58, 25.61, 52.36, 65.58, 6.33, 0.29),
            "IMTL": (39.35, 65.60, 0.54, 0.23, 26.02, 21.19, 26.20, 53.13, 66.24, 5.56, -0.59),
            "Nash-MTL": (40.13, 65.93, 0.53, 0.22, 25.26, 20.08, 28.40, 55.47, 68.15, 3.11, -4.04),
            "FAMO": (40.30, 66.07, 0.56, 0.21, 26.67, 21.83, 25.61, 51.78, 64.85, 5.44, 0.16),
            "FairGrad": (39.74, 66.01, 0.54, 0.22, 24.84, 19.60, 29.26, 56.58, 69.16, 3.00, -4.66),
            "FairGrad + COST": (38.06, 64.71, 0.54, 0.23, 24.47, 18.80, 30.84, 58.25, 70.30, 3.22, -5.39),
            "CAGrad + COST": (*[None] * 10, -1.61),
        },
    ),
    "celeba": Benchmark(
        title="CelebA (Table 3)",
        columns=tuple(Column(f"{name}_f1", name, True, 100) for name in ATTRIBUTES),
        shown=0,
        epochs=15,
        num_tasks=40,
        last_epochs=False,
        needs_data=True,
        published=_without_metrics(
            {
                "LS": (7.08, 4.15),
                "SI": (8.80, 7.20),
                "RLW": (5.98, 1.46),
                "DWA": (7.78, 2.40),
                "UW": (6.65, 3.23),
                "MGDA": (11.98, 14.85),
                "PCGrad": (7.58, 3.17),
                "CAGrad": (7.13, 2.48),
                "IMTL-G": (5.53, 0.84),
                "Nash-MTL": (5.73, 2.84),
                "FAMO": (5.65, 1.21),
                "FairGrad": (6.35, 1.15),
                "FairGrad + COST": (4.80, 0.93),
            },
            shown=0,
        ),
    ),
    "qm9": Benchmark(
        title="QM9 (Table 3)",
        columns=tuple(Column(f"{name}_mae", f"{name} [{TARGETS[name].report_unit}]", digits=3) for name in BENCHMARK),
        shown=11,
        epochs=300,
        num_tasks=11,
        last_epochs=False,
        needs_data=False,
        published={
            "Independent": (*(TARGETS[name].single_task_mae for name in BENCHMARK), None, None),
            **_without_metrics(
                {
                    "LS": (9.09, 177.6),
                    "SI": (5.64, 77.8),
                    "RLW": (10.64, 203.8),
                    "DWA": (8.91, 175.3),
                    "UW": (7.00, 108.0),
                    "MGDA": (8.91, 120.5),
                    "PCGrad": (7.36, 125.7),
                    "CAGrad": (8.09, 112.8),
                    "IMTL-G": (6.91, 77.2),
                    "Nash-MTL": (4.27, 62.0),
                    "FAMO": (5.18, 58.5),
                    "FairGrad": (4.82, 59.9),
                    "FairGrad + COST": (4.18, 58.3),
                },
                shown=11,
            ),
        },
    ),
}
"""The benchmarks by the names of their recipes. FairGrad on CelebA and QM9 is the paper's own run ("FairGrad-R")."""
