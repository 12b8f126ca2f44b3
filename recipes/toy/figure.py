"""The trajectories of the point, drawn over the mean of both losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from recipes.toy.problem import pareto_front, pareto_stationarity, toy_losses
from recipes.toy.run import Run

__all__ = ["draw"]

# Blue, vermilion and purple, which most color-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#8E2A80")
_STYLES = (":", "-", "--")
_LIMIT = 11.0
_LEVELS = np.arange(-16, 10, 2)
# The light half of a gray colormap, so that lines stand out.
_SHADES = ListedColormap(mpl.colormaps["bone"](np.linspace(0.55, 0.97, len(_LEVELS) - 1)))


def draw(runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Draw the trajectories of three methods, one for each of three starts, and what becomes of them along training."""
    figure = Figure(figsize=(15, 9.6), layout="constrained")
    panels = figure.subplots(2, 3)
    for axes, (method, of_method) in zip(panels[0], runs.items(), strict=True):
        _draw_losses(axes)
        axes.set_title(method)
        for run, color in zip(of_method, _COLORS, strict=True):
            _draw_trajectory(axes, run, color)
    panels[0, 0].set_ylabel(r"$\theta_2$")
    for axes in panels[0, 1:]:
        axes.tick_params(labelleft=False)
    shades = ScalarMappable(BoundaryNorm(_LEVELS, _SHADES.N), _SHADES)
    label = r"mean loss $(L_1 + L_2)\,/\,2$"
    figure.colorbar(shades, ax=panels[0], label=label, ticks=_LEVELS[::2], shrink=0.85, pad=0.02)
    gaps, stationarity, losses = panels[1]
    _draw_curves(gaps, runs, lambda run: run.gaps)
    gaps.set(title="Gap to the Pareto front", ylabel="how far both losses can still fall", yscale="log")
    _draw_curves(stationarity, runs, _smallest_stationarity)
    stationarity.set(
        title="Pareto stationarity, smallest so far", ylabel="min-norm point of the gradients", yscale="log"
    )
    _draw_curves(losses, runs, lambda run: toy_losses(run.points.double()).mean(-1).tolist())
    losses.set(title="Mean loss", ylabel=label)
    starts = [run.points[0].tolist() for run in next(iter(runs.values()))]
    figure.legend(handles=_legend(starts, list(runs)), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Axes, runs: Mapping[str, Sequence[Run]], figure_of: Callable[[Run], Sequence[float]]) -> None:
    for style, of_method in zip(_STYLES, runs.values(), strict=True):
        for run, color in zip(of_method, _COLORS, strict=True):
            axes.plot(figure_of(run), style, color=color, linewidth=1.5)
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _smallest_stationarity(run: Run) -> Sequence[float]:
    """The running minimum, which Theorem 1 is about."""
    return np.minimum.accumulate([pareto_stationarity(point) for point in run.points]).tolist()


def _draw_losses(axes: Axes) -> None:
    ticks = torch.linspace(-_LIMIT, _LIMIT, 400, dtype=torch.float64)
    t1, t2 = torch.meshgrid(ticks, ticks, indexing="xy")
    mean = toy_losses(torch.stack([t1, t2], dim=-1)).mean(dim=-1)
    axes.contourf(t1, t2, mean.numpy(), levels=_LEVELS, cmap=_SHADES, extend="both")
    axes.contour(t1, t2, mean.numpy(), levels=_LEVELS, colors="white", linewidths=0.5, linestyles="solid")
    axes.plot(*pareto_front().T, color="black", linewidth=4, solid_capstyle="round", zorder=3)
    axes.set(xlim=(-_LIMIT, _LIMIT), ylim=(-_LIMIT, _LIMIT), aspect="equal", xlabel=r"$\theta_1$")


def _draw_trajectory(axes: Axes, run: Run, color: str) -> None:
    axes.plot(*run.points.T, color=color, linewidth=1.8, zorder=4)
    for before, after in run.jumps:
        axes.plot(*torch.stack([before, after]).T, color="gold", linewidth=3, solid_capstyle="round", zorder=5)
    axes.plot(*run.points[0], "o", color=color, markersize=9, markeredgecolor="white", zorder=6)
    marker, size = ("*", 18) if run.reached else ("X", 12)
    axes.plot(*run.points[-1], marker, color=color, markersize=size, markeredgecolor="white", zorder=7)


def _legend(starts: Sequence[tuple[float, float]], methods: Sequence[str]) -> list[Line2D]:
    def mark(label: str, marker: str, color: str = "0.35") -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=color, markersize=10, label=label)

    return [
        *(mark(f"start ({t1:.3g}, {t2:.3g})", "o", color) for (t1, t2), color in zip(starts, _COLORS, strict=True)),
        mark("Pareto front reached", "*"),
        mark("out of steps", "X"),
        Line2D([], [], color="gold", linewidth=3, label="teleport"),
        Line2D([], [], color="black", linewidth=4, label="Pareto front"),
        *(Line2D([], [], color="black", linestyle=s, label=m) for s, m in zip(_STYLES, methods, strict=True)),
    ]
