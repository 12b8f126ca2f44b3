"""Plots of several runs: learning curves, and changes with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator
from numpy.typing import ArrayLike

__all__ = ["STYLE", "Curves", "intervals", "learning_curves", "panel_grid"]

# Okabe and Ito's colors, which most color-blind readers can tell apart.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_WORSE, _BETTER, _NEUTRAL = "#D55E00", "#009E73", "#666666"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":", "-."]) * cycler(color=_COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Curves:
    """A quantity after some optimizer steps (T,), in one or more runs (runs, T) that differ by their seed."""

    steps: Sequence[float]
    values: ArrayLike

    def __post_init__(self) -> None:
        shape = np.shape(self.values)
        if len(shape) != 2 or shape[0] == 0 or shape[1] != len(self.steps):
            raise ValueError(f"`values` must have shape (runs, {len(self.steps)}) with at least one run; got {shape}.")


@mpl.rc_context(STYLE)
def learning_curves(
    panels: Mapping[str, Mapping[str, Curves]],
    ylabel: str,
    columns: int = 3,
    logarithmic_above: float | None = None,
    xlabel: str = "step",
) -> Figure:
    """Draw the mean over the seeds, with a band from the lowest to the highest seed.

    Args:
        panels: Title of the panel to variant to curves. Panels in one row share their axes.
        ylabel: What the values are.
        columns: Panels per row.
        logarithmic_above: The vertical axis is logarithmic from this absolute value on; None: linear.
        xlabel: What the steps are.
    """
    figure, axes = panel_grid(panels, columns, 3.1, xlabel, ylabel)
    for ax, (title, variants) in zip(axes, panels.items(), strict=True):
        for variant, curves in variants.items():
            values = np.asarray(curves.values, dtype=float)
            marker = "o" if len(curves.steps) == 1 else None
            (line,) = ax.plot(curves.steps, values.mean(axis=0), linewidth=1.8, marker=marker, label=variant)
            low, high = values.min(axis=0), values.max(axis=0)
            ax.fill_between(curves.steps, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
        if logarithmic_above is not None:
            ax.set_yscale("symlog", linthresh=logarithmic_above)
            ax.yaxis.set_major_locator(SymmetricalLogLocator(linthresh=logarithmic_above, base=10, subs=[1, 2, 5]))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_title(title)
        ax.legend()
    return figure


@mpl.rc_context(STYLE)
def intervals(panels: Mapping[str, Mapping[str, tuple[float, float, float]]], xlabel: str, columns: int = 2) -> Figure:
    """Draw means with their intervals, one line per row, and a line at no change.

    Args:
        panels: Title of the panel to row to mean, lower and upper end. Ends that are NaN are not drawn. All panels must
            have the same rows.
        xlabel: What the numbers are.
        columns: Panels per row of the figure.
    """
    rows = [list(entries) for entries in panels.values()]
    if any(of_panel != rows[0] for of_panel in rows):
        raise ValueError(f"`panels` must all have the same rows; got {rows}.")
    figure, axes = panel_grid(panels, columns, max(2.0, 0.8 + 0.24 * len(rows[0]) if rows else 0), xlabel, "")
    for ax, (title, entries) in zip(axes, panels.items(), strict=True):
        ax.axvline(0, color=_NEUTRAL, linewidth=0.8, zorder=0)
        for place, (mean, low, high) in enumerate(entries.values()):
            color = _BETTER if high < 0 else _WORSE if low > 0 else _NEUTRAL
            ax.plot([low, high], [place, place], "-", color=color, linewidth=1.6)
            ax.plot([mean], [place], "o", color=color, markersize=4)
        ax.set_yticks(range(len(entries)), list(entries))
        ax.set_ylim(len(entries) - 0.5, -0.5)
        ax.set_title(title)
    return figure


def panel_grid(
    panels: Mapping[str, Sized], columns: int, height: float, xlabel: str, ylabel: str
) -> tuple[Figure, list[Axes]]:
    """An empty panel for each title, `columns` in a row. Panels in one row share their axes.

    Raises:
        ValueError: If there is no panel, or one that shows nothing.
    """
    if not panels or not all(panels.values()):
        raise ValueError(f"`panels` must map at least one title to what its panel shows; got {panels!r}.")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.9 * columns, height * rows), dpi=150, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex="row", sharey="row").flat)
    axes = grid[: len(panels)]
    for ax in grid[len(panels) :]:
        ax.remove()
    for ax in axes[::columns]:
        ax.set_ylabel(ylabel)
    # The lowest of each column.
    for ax in axes[-columns:]:
        ax.set_xlabel(xlabel)
    return figure, axes
