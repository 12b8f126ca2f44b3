"""What a teleport looks for among the points with the same task losses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_cost._arguments import (
    as_number,
    check_choice,
    check_floating,
    check_integer,
    check_kind,
    check_positive,
    check_share,
    describe,
)
from lightning_cost._derivatives import EPSILON, Derivative, check_derivative, hessian_vector
from lightning_cost._vectors import row_dtype
from lightning_cost.gradients import TaskGradients
from lightning_cost.surface import Point, Surface

__all__ = [
    "ConflictAlignment",
    "GradientNorm",
    "Objective",
    "RandomDirection",
    "Reversed",
    "SampledSharpness",
    "balance_weights",
]

Terms = Literal["mean", "both"]


class Objective(ABC):
    """Something to increase while the task losses stay as they are.

    Subclass it to search for something else. A search climbs along the gradient. A teleport is accepted only if the
    value has grown. A value of ``None`` means that nothing needs to grow.
    """

    uses_task_gradients: bool = True
    """Whether :meth:`value_and_gradient` reads the task gradients of its point."""

    def begin(self, surface: Surface, start: Point) -> None:
        """Prepare for a teleport from ``start``. It is called once per teleport, before anything else."""
        return

    @abstractmethod
    def value(self, surface: Surface, point: Point) -> float | None:
        """The objective at ``point``, where the surface is. Larger is better.

        It is called where the teleport starts and at candidates. Their task gradients are always known.
        """

    def aim(self, value: float) -> float:
        """The objective that one step aims at, given its present value. Infinity asks for the longest step."""
        return math.inf

    @abstractmethod
    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[float | None, Tensor]:
        """The objective at ``point`` and its gradient with respect to the shared parameters, shape ``(P,)``.

        The surface is at ``point``. It must be there again on return.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def checked_value(objective: Objective, surface: Surface, point: Point) -> float | None:
    """:meth:`Objective.value`.

    Raises:
        TypeError: If it is neither a number nor ``None``.
    """
    return as_number(f"{type(objective).__name__}.value", objective.value(surface, point))


def checked_gradient(objective: Objective, surface: Surface, point: Point) -> tuple[float | None, Tensor]:
    """:meth:`Objective.value_and_gradient`.

    Raises:
        TypeError: If it is not a number or ``None``, and a vector like those of the surface, of shape ``(P,)``.
    """
    name = f"{type(objective).__name__}.value_and_gradient"
    returned = objective.value_and_gradient(surface, point)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(f"`{name}` must return a value and a gradient; got {describe(returned)}.")
    value, gradient = returned
    if not isinstance(gradient, Tensor) or gradient.shape != (surface.num_parameters,):
        shape = (surface.num_parameters,)
        raise TypeError(f"`{name}` must return a gradient of shape {shape}; got {describe(gradient)}.")
    check_kind(f"gradient of {name}", gradient, row_dtype(surface.shared), surface.shared[0].device)
    return as_number(name, value), gradient.detach()


def checked_aim(objective: Objective, value: float) -> float:
    """:meth:`Objective.aim`.

    Raises:
        TypeError: If it is not a number.
    """
    name = f"{type(objective).__name__}.aim"
    aim = as_number(name, objective.aim(value))
    if aim is None or math.isnan(aim):
        raise TypeError(f"`{name}` must return a number, or infinity for the longest step; got {aim}.")
    return aim


class ConflictAlignment(Objective):
    r"""The smallest cosine between a task gradient and their mean, :math:`c = \min_i \cos \phi_{i0}`.

    This is conflict itself (Definition 1). The paper maximizes sharpness instead (Eq. 8). Let :math:`a` be the task
    with the smallest cosine. The gradient of :math:`c` takes two Hessian-vector products, however many tasks there are:
    :math:`H_0 \, \partial c / \partial g_0 + H_a \, \partial c / \partial g_a`. The first of them turns the mean
    towards the task, and costs half as much alone.

    Args:
        derivative: ``"finite_difference"`` takes one-sided differences of gradients. Each costs an ordinary forward and
            backward pass. ``"double_backward"`` is exact, but some operations do not support it (cuDNN RNNs), and it
            holds a second graph in memory.
        epsilon: Length of the finite difference, relative to the norm of the shared parameters.
        target: The cosine that one step aims at, in (-1, 1]. A step aims at 0.1 more than the present cosine at least.
        terms: ``"both"`` takes both products, ``"mean"`` the first one only.
    """

    def __init__(
        self,
        derivative: Derivative = "finite_difference",
        epsilon: float = EPSILON,
        target: float = 0.2,
        terms: Terms = "both",
    ) -> None:
        check_choice("terms", terms, get_args(Terms))
        check_derivative(derivative, epsilon)
        self.terms = terms
        self.derivative = derivative
        self.epsilon = epsilon
        check_share("target", target, -1)
        self.target = target

    def aim(self, value: float) -> float:
        """The target, or a little more than the present cosine."""
        return max(self.target, value + 0.1)

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[float, Tensor]:
        """See :meth:`Objective.value_and_gradient`. A finite difference takes a forward and a backward pass a batch."""
        gradients = point.gradients
        worst = _worst(gradients)
        mean, task = gradients.mean, gradients.matrix[worst]
        mean_norm, task_norm = mean.norm(), task.norm()
        if mean_norm == 0 or task_norm == 0:
            return 0.0, torch.zeros_like(mean)
        cosine = mean @ task / (mean_norm * task_norm)
        # In place, as everywhere with P elements: allocating a vector takes longer than several operations on it.
        num_tasks = len(gradients.names)
        weights = [torch.full((num_tasks,), 1 / num_tasks, dtype=mean.dtype)]
        vectors = [(task / task_norm).sub_(mean, alpha=float(cosine / mean_norm)).div_(mean_norm)]
        if self.terms == "both":
            weights.append(torch.eye(num_tasks, dtype=mean.dtype)[worst])
            vectors.append((mean / mean_norm).sub_(task, alpha=float(cosine / task_norm)).div_(task_norm))
        if self.derivative == "double_backward":
            first, *rest = surface.hessian_vector_products(weights, vectors)
        else:
            first, *rest = (
                hessian_vector(surface, weight, gradient, vector, self.epsilon)
                for weight, gradient, vector in zip(weights, (mean, task), vectors, strict=False)
            )
        return float(cosine), first.add_(rest[0]) if rest else first

    def value(self, surface: Surface, point: Point) -> float:
        """The smallest cosine, in [-1, 1]."""
        gradients = point.gradients
        return float(gradients.cosines[_worst(gradients)])

    def __repr__(self) -> str:
        return (
            f"ConflictAlignment(derivative={self.derivative!r}, epsilon={self.epsilon}, target={self.target},"
            f" terms={self.terms!r})"
        )


class GradientNorm(Objective):
    r"""The norm :math:`\|g_0\|` of the gradient of the mean loss: the exact form of Eq. 2 and 6.

    A larger gradient and less conflict are different goals. An optimizer like Adam ignores the length of a gradient.

    Args:
        derivative: See :class:`ConflictAlignment`.
        epsilon: See :class:`ConflictAlignment`.
    """

    def __init__(self, derivative: Derivative = "finite_difference", epsilon: float = EPSILON) -> None:
        check_derivative(derivative, epsilon)
        self.derivative = derivative
        self.epsilon = epsilon

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[float, Tensor]:
        """See :meth:`Objective.value_and_gradient`. One Hessian-vector product: :math:`H_0 g_0 / |g_0|`."""
        mean = point.gradients.mean
        norm = mean.norm()
        if norm == 0:
            return 0.0, torch.zeros_like(mean)
        num_tasks = len(point.gradients.names)
        average = torch.full((num_tasks,), 1 / num_tasks, dtype=mean.dtype)
        if self.derivative == "double_backward":
            return float(norm), surface.hessian_vector_products([average], [mean / norm])[0]
        return float(norm), hessian_vector(surface, average, mean, mean / norm, self.epsilon)

    def value(self, surface: Surface, point: Point) -> float:
        """The norm of the mean gradient."""
        return float(point.gradients.mean_norm)

    def __repr__(self) -> str:
        return f"GradientNorm(derivative={self.derivative!r}, epsilon={self.epsilon})"


class SampledSharpness(Objective):
    r"""What the paper uses instead of the gradient norm: losses at random points on a sphere (Eq. 8 to 10).

    The :math:`\epsilon_j` are uniform on the sphere of radius :math:`\delta` in the space of the shared parameters. The
    weights :math:`R_i` are those of :func:`balance_weights` (Eq. 10) where the teleport starts. There are two forms:

    - ``form="loss"``, Eq. 9 as printed: :math:`\max_j |\frac{1}{K} \sum_i R_i L_i(\theta + \epsilon_j)|`.
    - ``form="difference"``, Eq. 8: :math:`\max_j |\frac{1}{K} \sum_i R_i (L_i(\theta + \epsilon_j) - L_i(\theta))|`.

    Eq. 9 leaves out the difference, because :math:`L(\theta^*)` is constant. What is left is large where the *losses*
    are large, and the loss invariance of Eq. 7 works against that.

    Args:
        form: ``"loss"`` or ``"difference"``.
        samples: Number of random points. The paper does not state it.
        radius: Radius :math:`\delta` of the sphere, in the norm of the parameters. The paper does not state it; 0.05 is
            common in sharpness-aware minimization.
    """

    uses_task_gradients = False

    def __init__(self, form: Literal["loss", "difference"] = "loss", samples: int = 5, radius: float = 0.05) -> None:
        if form not in ("loss", "difference"):
            raise ValueError(f"`form` must be 'loss' (Eq. 9) or 'difference' (Eq. 8); got {form!r}.")
        check_integer("samples", samples, 1)
        self.form = form
        self.samples = samples
        self.radius = check_positive("radius", radius)
        self._weights: Tensor | None = None
        self._noises: list[Tensor] = []

    def begin(self, surface: Surface, start: Point) -> None:
        """Fix the weights :math:`R_i`, and the random points at which values are compared."""
        self._weights = balance_weights(start.gradients.norms)
        self._noises = self._sample(surface)

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[float, Tensor]:
        """See :meth:`Objective.value_and_gradient`, at fresh random points.

        It takes one forward pass per sample and batch, then one forward and backward pass, or two for the difference.
        """
        weights, noises = self._normalized_weights(), self._sample(surface)
        values = self._values(surface, point, noises)
        best = max(range(self.samples), key=lambda j: abs(values[j]))
        with surface.displaced(noises[best]):
            gradient = surface.gradient(weights)[1]
        if self.form == "difference":
            gradient = gradient - surface.gradient(weights)[1]
        return abs(values[best]), gradient * math.copysign(1.0, values[best])

    def value(self, surface: Surface, point: Point) -> float:
        """The sharpness at random points, the same ones for the whole teleport."""
        return max(abs(value) for value in self._values(surface, point, self._noises))

    def _sample(self, surface: Surface) -> list[Tensor]:
        noises = [surface.standard_normal() for _ in range(self.samples)]
        return [noise * (self.radius / noise.norm()) for noise in noises]

    def _normalized_weights(self) -> Tensor:
        if self._weights is None:
            raise RuntimeError("`begin` must be called first.")
        return self._weights / len(self._weights)

    def _values(self, surface: Surface, point: Point, noises: list[Tensor]) -> list[float]:
        weights = self._normalized_weights()
        reference = float(weights @ point.losses.to(weights)) if self.form == "difference" else 0.0
        values = []
        for noise in noises:
            with surface.displaced(noise):
                values.append(float(weights @ surface.losses().to(weights)) - reference)
        return values

    def __repr__(self) -> str:
        return f"SampledSharpness(form={self.form!r}, samples={self.samples}, radius={self.radius})"


class RandomDirection(Objective):
    """A random direction: a control that shows what moving along the level set does by itself.

    The teleport accepts every candidate within the tolerance.
    """

    uses_task_gradients = False

    def value(self, surface: Surface, point: Point) -> None:
        """Nothing needs to grow."""
        return

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[None, Tensor]:
        """A standard normal vector."""
        return None, surface.standard_normal()


class Reversed(Objective):
    """The opposite of an objective: a control that shows whether its direction matters.

    Args:
        objective: The objective to decrease.
    """

    def __init__(self, objective: Objective) -> None:
        if not isinstance(objective, Objective):
            raise TypeError(f"`objective` must be a lightning_cost.objectives.Objective; got {objective!r}.")
        self.objective = objective
        self.uses_task_gradients = objective.uses_task_gradients

    def begin(self, surface: Surface, start: Point) -> None:
        """Prepare the objective that is reversed."""
        self.objective.begin(surface, start)

    def value(self, surface: Surface, point: Point) -> float | None:
        """The negative value."""
        value = checked_value(self.objective, surface, point)
        return None if value is None else -value

    def aim(self, value: float) -> float:
        """Aims as far down as the objective aims up."""
        return value + checked_aim(self.objective, -value) + value

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[float | None, Tensor]:
        """The negative value and gradient."""
        value, gradient = checked_gradient(self.objective, surface, point)
        return None if value is None else -value, -gradient

    def __repr__(self) -> str:
        return f"Reversed({self.objective!r})"


def balance_weights(norms: Tensor) -> Tensor:
    r"""The task weights :math:`R = K \cdot \mathrm{softmax}(\sum_j \|g_j\| / \|g_i\|)` (Eq. 10).

    They favor tasks with small gradients. They saturate early: if two norms differ by a factor of about 20, one task
    has all the weight. A task without gradient has the weight 0, and counts for neither the sum nor :math:`K`.

    Args:
        norms: Norms of the task gradients, shape ``(K,)``.

    Returns:
        Weights that sum to :math:`K`, shape ``(K,)``, on the CPU.

    Raises:
        ValueError: If a norm is negative or not finite.

    Example:
        >>> balance_weights(torch.tensor([1.0, 1.0]))
        tensor([1., 1.])
    """
    check_floating("norms", norms)
    if norms.ndim != 1 or not len(norms):
        raise ValueError(f"`norms` must have shape (K,); got {describe(norms)}.")
    wide = norms.detach().cpu().double()
    if not bool((torch.isfinite(wide) & (wide >= 0)).all()):
        raise ValueError(f"`norms` must be finite and not negative; got {wide.tolist()}.")
    there = wide != 0
    # A quotient may overflow, and infinity would make the softmax NaN.
    ratios = (wide.sum() / wide).clamp_max(torch.finfo(wide.dtype).max).masked_fill(~there, -math.inf)
    if not bool(there.any()):
        return torch.zeros_like(wide).to(norms.dtype)
    return (int(there.sum()) * torch.softmax(ratios, dim=0)).to(norms.dtype)


def _worst(gradients: TaskGradients) -> int:
    """The task with the smallest cosine, among those that have a gradient."""
    return int(gradients.cosines.masked_fill(gradients.norms == 0, math.inf).argmin())
