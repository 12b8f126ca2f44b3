"""Figures of dense predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from recipes.dense.layout import Layout
from recipes.dense.losses import IGNORED

__all__ = ["class_colors", "confusion_figure", "examples_figure"]

_UNKNOWN = "0.85"
_TITLES = {"segmentation": "classes", "depth": "depth", "normals": "normals"}


def examples_figure(layout: Layout, examples: Sequence[Mapping[str, Tensor]], title: str) -> Figure:
    """Draw one row per example: the image, and the truth and the prediction of each task.

    The colors of depth go from zero to the largest true depth of the row. Normals show x, y and z as red, green and
    blue. Unknown pixels are gray.

    Args:
        layout: The benchmark.
        examples: `image` (3, H, W), targets by their tasks as in a batch, and `predicted_<task>` as the model returns.
        title: Title of the figure.
    """
    tasks = [name for name in layout.tasks if name in examples[0]]
    rows, columns = len(examples), 1 + 2 * len(tasks)
    height, width = examples[0]["image"].shape[-2:]
    figure = Figure(figsize=(2.2 * columns, 2.2 * rows * height / width + 1.1), layout="constrained", dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, example in zip(axes, examples, strict=True):
        row[0].imshow(_channels_last(example["image"]).clip(0, 1))
        for task, true_ax, predicted_ax in zip(tasks, row[1::2], row[2::2], strict=True):
            _DRAW[task](true_ax, predicted_ax, example[task], example[f"predicted_{task}"], layout)
    axes[0, 0].set_title("image", fontsize="small")
    for task, true_ax, predicted_ax in zip(tasks, axes[0, 1::2], axes[0, 2::2], strict=True):
        true_ax.set_title(f"{_TITLES[task]}, true", fontsize="small")
        predicted_ax.set_title("predicted", fontsize="small")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize="medium")
    if "segmentation" in tasks:
        colors = zip(layout.classes, class_colors(len(layout.classes)), strict=True)
        handles = [Patch(color=color, label=name) for name, color in colors]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(13, len(handles)), fontsize="x-small")
    return figure


def confusion_figure(counts: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Draw the share of each true class (row) that is predicted as each class (column).

    Args:
        counts: Number of pixels by their true and predicted class, (C, C).
        classes: Names of the classes.
        title: Title of the figure.
    """
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = 2.5 + 0.5 * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained", dpi=100)
    ax = figure.subplots()
    metric = MulticlassConfusionMatrix(len(classes))
    metric.plot(shares.cpu(), ax=ax, labels=list(classes), cmap="Blues")
    for text in ax.texts:
        text.set_fontsize("x-small")
    ax.set_title(title, fontsize="medium")
    return figure


def class_colors(number: int) -> NDArray[np.float64]:
    """Up to 20 different colors as red, green and blue from 0 to 1, (number, 3); after that they repeat."""
    # Neighbors in this map have the same hue, so its even entries come first.
    palette = np.asarray(mpl.colormaps["tab20"].colors)
    return np.resize(np.concatenate([palette[::2], palette[1::2]]), (number, 3))


def _draw_classes(true_ax: Axes, predicted_ax: Axes, labels: Tensor, logits: Tensor, layout: Layout) -> None:
    colors = ListedColormap(class_colors(len(layout.classes))).with_extremes(under=_UNKNOWN)
    for ax, classes in ((true_ax, labels), (predicted_ax, logits.argmax(dim=0))):
        ax.imshow(
            classes.numpy(), cmap=colors, vmin=IGNORED + 0.5, vmax=len(layout.classes) - 0.5, interpolation="nearest"
        )


def _draw_depth(true_ax: Axes, predicted_ax: Axes, depth: Tensor, predicted: Tensor, layout: Layout) -> None:
    colors = mpl.colormaps["viridis"].with_extremes(bad=_UNKNOWN)
    known = np.ma.masked_less_equal(depth[0].numpy(), 0)
    largest = known.max() if known.count() else layout.largest_depth
    for ax, values in ((true_ax, known), (predicted_ax, predicted[0].numpy())):
        ax.imshow(values, cmap=colors, vmin=0, vmax=largest, interpolation="nearest")


def _draw_normals(true_ax: Axes, predicted_ax: Axes, normals: Tensor, predicted: Tensor, layout: Layout) -> None:
    unknown = torch.full((3,), float(_UNKNOWN))
    for ax, vectors in ((true_ax, normals), (predicted_ax, predicted)):
        colors = torch.from_numpy(_channels_last((vectors + 1) / 2))
        known = torch.from_numpy(_channels_last(vectors != 0)).any(dim=-1, keepdim=True)
        ax.imshow(torch.where(known, colors, unknown).numpy().clip(0, 1), interpolation="nearest")


_DRAW = {"segmentation": _draw_classes, "depth": _draw_depth, "normals": _draw_normals}


def _channels_last(values: Tensor) -> NDArray[np.float32]:
    return values.movedim(0, -1).numpy()
