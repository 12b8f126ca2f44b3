"""Does sampled sharpness (Eq. 8 and 9 of the paper) follow the norm of the gradient?

The paper maximizes the largest loss at a few random points on a sphere, in place of the norm of the gradient. On a
small network, all that these values consist of can be computed: the gradient, the trace of the Hessian, and the true
maximum over the ball.

Run `python -m benchmarks.sharpness`, or `--points 4 --seeds 1` for a quick look.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from benchmarks.many import prepared, steps
from lightning_cost import Point, Surface
from lightning_cost.objectives import SampledSharpness, balance_weights
from recipes.study.report import write_csv

RADII = (0.005, 0.05, 0.5)
SAMPLES = (1, 5, 20, 100)


@dataclass(frozen=True)
class Value:
    """What sampled sharpness is at a point, beside the true values there.

    Attributes:
        seed: The seed of the training.
        step: Its step.
        form: `"difference"` (Eq. 8) or `"loss"` (Eq. 9).
        radius: Radius of the sphere.
        samples: Number of random points.
        sampled: The sampled sharpness.
        norm: Norm of the weighted mean gradient.
        loss: The weighted mean loss.
        exact: The maximum of Eq. 8 over the ball, by ascent from several starts.
        trace: Trace of the Hessian of the weighted mean loss.
    """

    seed: int
    step: int
    form: str
    radius: float
    samples: int
    sampled: float
    norm: float
    loss: float
    exact: float
    trace: float


def points(name: str, seed: int, count: int, every: int) -> Iterator[tuple[int, Surface, Point]]:
    """Train with the mean of the losses, and stop at every n-th step."""
    for step, surface, start in steps(*prepared(name, seed)):
        if step % every == 0:
            grads = surface.grads()
            yield step, surface, start
            surface.set_grads(grads)
            count -= 1
            if not count:
                return


def measure(seed: int, step: int, surface: Surface, start: Point, radii: Sequence[float]) -> list[Value]:
    """All settings at a point."""
    weights = balance_weights(start.gradients.norms)
    weights = weights / len(weights)
    losses, gradient = surface.gradient(weights)
    loss, norm = float(losses @ weights), float(gradient.norm())
    trace, values = hessian_trace(surface, weights), []
    for radius in radii:
        exact = exact_sharpness(surface, weights, loss, radius)
        for form in ("difference", "loss"):
            for samples in SAMPLES:
                objective = SampledSharpness(form, samples, radius)  # type: ignore[arg-type]
                objective.begin(surface, start)
                sampled = objective.value(surface, start)
                values.append(Value(seed, step, form, radius, samples, sampled, norm, loss, exact, trace))
    return values


def exact_sharpness(surface: Surface, weights: Tensor, loss: float, radius: float, steps: int = 20) -> float:
    """The maximum of Eq. 8: projected ascent of the loss and of its negative, from the gradient and two random starts.

    Each step goes to the end of the ball in the direction of the gradient, which for a convex function never goes down.
    """
    best = 0.0
    gradient = surface.gradient(weights)[1]
    for sign in (1.0, -1.0):
        for start in (gradient * sign, surface.standard_normal(), surface.standard_normal()):
            offset = start * (radius / start.norm())
            for _ in range(steps):
                with surface.displaced(offset):
                    losses, there = surface.gradient(weights)
                best = max(best, abs(float(losses @ weights) - loss))
                offset = there * (sign * radius / float(there.norm().clamp_min(1e-30)))
    return best


def hessian_trace(surface: Surface, weights: Tensor, probes: int = 30, length: float = 1e-2) -> float:
    """Hutchinson's estimate of the trace, by central differences of the gradient."""
    total = 0.0
    for _ in range(probes):
        vector = surface.standard_normal().sign()
        scale = length / float(vector.norm())
        with surface.displaced(vector, scale):
            ahead = surface.gradient(weights)[1]
        with surface.displaced(vector, -scale):
            behind = surface.gradient(weights)[1]
        total += float((ahead - behind) @ vector) / (2 * scale)
    return total / probes


def by_seed(values: Sequence[Value], attribute: str) -> list[float]:
    """The correlation of the sampled sharpness with another value along training, for each seed."""
    found = []
    for seed in sorted({value.seed for value in values}):
        mine = [value for value in values if value.seed == seed]
        pair = ([v.sampled for v in mine], [getattr(v, attribute) for v in mine])
        found.append(float(spearman_corrcoef(*(torch.tensor(values, dtype=torch.double) for values in pair))))
    return found


def table_of(values: Sequence[Value], title: str) -> Table:
    """One row for each form, radius and number of samples: mean and range over the seeds."""
    table = Table(title=title)
    for heading in ("form", "radius", "samples", "norm of the gradient", "exact sharpness", "loss"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for form, radius, samples in sorted({(v.form, v.radius, v.samples) for v in values}):
        mine = [v for v in values if (v.form, v.radius, v.samples) == (form, radius, samples)]
        cells = []
        for attribute in ("norm", "exact", "loss"):
            found = by_seed(mine, attribute)
            cells.append(f"{sum(found) / len(found):+.2f} [{min(found):+.2f}, {max(found):+.2f}]")
        table.add_row(f"Eq. {8 if form == 'difference' else 9}", f"{radius:g}", str(samples), *cells)
    return table


def crossover(values: Sequence[Value], elements: int) -> float:
    """The radius at which slope and curvature contribute alike to a random point, at the median point.

    On the sphere, the slope gives about radius * norm / sqrt(P), and the curvature radius^2 * trace / (2 P).
    """
    ratios = [2 * math.sqrt(elements) * v.norm / abs(v.trace) for v in values]
    return float(torch.tensor(ratios).median())


def draw(path: Path, values: Sequence[Value], radius: float = 0.05, samples: int = 5) -> None:
    """Draw the sampled sharpness of both equations against the norm of the gradient, a color for each seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for ax, (form, title) in zip(
        figure.subplots(1, 2), (("difference", "Eq. 8: the difference"), ("loss", "Eq. 9, as printed")), strict=True
    ):
        for seed in sorted({v.seed for v in values}):
            mine = [v for v in values if (v.seed, v.form, v.radius, v.samples) == (seed, form, radius, samples)]
            ax.scatter([v.norm for v in mine], [v.sampled for v in mine], s=12, label=f"seed {seed}")
        ax.set(title=title, xscale="log", yscale="log", xlabel="norm of the gradient", ylabel="sampled sharpness")
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser("python -m benchmarks.sharpness", description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="digits:narrow")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--every", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("sharpness_output"))
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    values: list[Value] = []
    elements = 0
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for step, surface, start in points(options.problem, seed, options.points, options.every):
            values += measure(seed, step, surface, start, RADII)
            elements = len(surface.standard_normal())
    console: Any = Console(width=120)
    title = f"Rank correlation of sampled sharpness along training, {options.problem}: mean [range over seeds]"
    console.print(table_of(values, title))
    console.print(
        f"{elements} shared parameters. At a random point, curvature outweighs the slope beyond a radius of"
        f" {crossover(values, elements):.2g} (median)."
    )
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "sharpness.csv", list(map(asdict, values)))
    draw(options.output / "sharpness.png", values)


if __name__ == "__main__":
    main()
