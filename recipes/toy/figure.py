"""The trajectories of the point, drawn over the mean of both losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from recipes.toy.problem import pareto_front, toy_losses
from recipes.toy.run import Run

__all__ = ["draw"]

# Blue, vermilion and purple, which most color-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#8E2A80")
_LIMIT = 11.0
_LEVELS = np.arange(-16, 10, 2)
# The light half of a gray colormap, so that lines stand out.
_SHADES = ListedColormap(mpl.colormaps["bone"](np.linspace(0.55, 0.97, len(_LEVELS) - 1)))


def draw(runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Draw the trajectories of two methods, one for each of three starts, and their gaps to the Pareto front."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    left, right, gaps = figure.subplots(1, 3)
    for axes, style, (method, of_method) in zip((left, right), ("--", "-"), runs.items(), strict=True):
        _draw_losses(axes)
        axes.set_title(method)
        gaps.plot([], [], style, color="black", label=method)
        for run, color in zip(of_method, _COLORS, strict=True):
            _draw_trajectory(axes, run, color)
            gaps.plot(run.gaps, style, color=color, linewidth=1.8)
    left.set_ylabel(r"$\theta_2$")
    right.tick_params(labelleft=False)
    shades = ScalarMappable(BoundaryNorm(_LEVELS, _SHADES.N), _SHADES)
    label = r"mean loss $(L_1 + L_2)\,/\,2$"
    figure.colorbar(shades, ax=[left, right], label=label, ticks=_LEVELS[::2], shrink=0.85, pad=0.02)
    gaps.set(title="Gap to the Pareto front", xlabel="optimizer step", ylabel="how far both losses can still fall")
    gaps.set_yscale("log")
    gaps.set_box_aspect(1)
    gaps.grid(alpha=0.3)
    gaps.spines[["top", "right"]].set_visible(False)
    gaps.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.88))
    starts = [run.points[0].tolist() for run in next(iter(runs.values()))]
    figure.legend(handles=_legend(starts), loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=150)


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


def _legend(starts: Sequence[tuple[float, float]]) -> list[Line2D]:
    def mark(label: str, marker: str, color: str = "0.35") -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=color, markersize=10, label=label)

    return [
        *(mark(f"start ({t1:.3g}, {t2:.3g})", "o", color) for (t1, t2), color in zip(starts, _COLORS, strict=True)),
        mark("Pareto front reached", "*"),
        mark("out of steps", "X"),
        Line2D([], [], color="gold", linewidth=3, label="teleport"),
        Line2D([], [], color="black", linewidth=4, label="Pareto front"),
    ]
