"""What `docs/evidence.md` measures, and what is not part of the library."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cost import MultiTaskMixin, Point, Surface, SymmetryTeleportCallback, TaskGradients
from lightning_cost._derivatives import EPSILON, hessian_vector
from lightning_cost.objectives import ConflictAlignment, Objective
from lightning_cost.triggers import dominated_conflict

__all__ = [
    "CosineBelow",
    "EpochTeleportCallback",
    "LookAhead",
    "LookAheadCallback",
    "LowestCosines",
    "OptionsOfMixin",
    "RunningDirection",
    "SmoothedTrigger",
    "SoftMinimum",
]


class OptionsOfMixin(Callback):
    """Sets options of a `MultiTaskMixin` before training, so that a method can be compared with and without them."""

    def __init__(self, **options: Any) -> None:
        unknown = [name for name in options if not hasattr(MultiTaskMixin, name)]
        if unknown:
            raise ValueError(f"A MultiTaskMixin has no options {unknown}.")
        self.options = options

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set them. The module reads them in its own `setup`, which comes later."""
        for name, value in self.options.items():
            setattr(pl_module, name, value)

    def __repr__(self) -> str:
        return f"OptionsOfMixin({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


class EpochTeleportCallback(SymmetryTeleportCallback):
    """Teleports only in some epochs, counted from 0."""

    def __init__(self, epochs: Collection[int], **settings: Any) -> None:
        super().__init__(start_epoch=0, **settings)
        self.epochs = frozenset(epochs)

    def __repr__(self) -> str:
        return f"{super().__repr__()} in epochs {sorted(self.epochs)}"

    @override
    def should_check(self, trainer: L.Trainer, pl_module: MultiTaskMixin) -> bool:
        """Whether this is one of the epochs, and the schedule agrees."""
        return trainer.current_epoch in self.epochs and super().should_check(trainer, pl_module)


class SmoothedTrigger:
    """The default trigger on a running mean of the task gradients, which keeps a share `decay` of it at each check."""

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1); got {decay!r}.")
        self.decay = decay
        self._mean: Tensor | None = None

    def __call__(self, gradients: TaskGradients) -> bool:
        """Whether the mean conflicts, with the gradients of this check included."""
        if self._mean is None:
            self._mean = gradients.matrix.clone()
        else:
            self._mean.lerp_(gradients.matrix, 1 - self.decay)
        return dominated_conflict(TaskGradients(gradients.names, self._mean))

    def __repr__(self) -> str:
        return f"SmoothedTrigger(decay={self.decay})"


class LowestCosines:
    """Fires where the smallest cosine with the mean is negative, and among the lowest of the checks before.

    The threshold follows training. Until there is something to compare with, it does not fire.

    Args:
        share: Share of the checks that it may fire at.
        window: Number of checks that it looks back at.
    """

    def __init__(self, share: float = 0.2, window: int = 100) -> None:
        if not 0 < share < 1:
            raise ValueError(f"`share` must be in (0, 1); got {share!r}.")
        if window < 1 / share:
            raise ValueError(f"`window` must be at least 1 / `share`; got {window!r} with share={share!r}.")
        self.share, self.window = share, window
        self._seen: deque[float] = deque(maxlen=window)

    def __call__(self, gradients: TaskGradients) -> bool:
        """Whether it is, with the cosines of this check remembered for the next ones."""
        cosine = float(gradients.cosines.min())
        known = len(self._seen) >= 1 / self.share
        threshold = float(torch.tensor(self._seen).quantile(self.share)) if known else -torch.inf
        self._seen.append(cosine)
        return cosine < min(threshold, 0.0)

    def __repr__(self) -> str:
        return f"LowestCosines(share={self.share}, window={self.window})"


class CosineBelow:
    """Fires where the smallest cosine with the mean is below a fixed threshold."""

    def __init__(self, threshold: float) -> None:
        if not -1 < threshold <= 0:
            raise ValueError(f"`threshold` must be in (-1, 0]; got {threshold!r}.")
        self.threshold = threshold

    def __call__(self, gradients: TaskGradients) -> bool:
        """Whether it is."""
        return float(gradients.cosines.min()) < self.threshold

    def __repr__(self) -> str:
        return f"CosineBelow({self.threshold})"


class LookAhead(Objective):
    r"""How much one step of Adam lowers the losses: :math:`-\frac1K\sum_i \log L_i(\theta - \eta P g_0(\theta))`.

    :math:`\eta` is the learning rate. :math:`P` is the preconditioner from the second moment of the optimizer, or 1 if
    it has none. The gradient treats :math:`P` as a constant: with :math:`g'` the gradient at the point ahead, it is
    :math:`g' - \eta H_0 P g'`. With a finite difference, this takes three forward and two backward passes.

    Args:
        steps: How far to look, in optimizer steps.
        epsilon: Length of the finite difference, relative to the norm of the shared parameters.
    """

    def __init__(self, steps: float = 1.0, epsilon: float = 5e-3) -> None:
        self.steps, self.epsilon = steps, epsilon
        self.optimizer: Optimizer | None = None

    def value(self, surface: Surface, point: Point) -> float:
        """Minus the mean logarithm of the losses one step ahead."""
        with surface.displaced(point.gradients.mean * self._preconditioner(surface), -1.0):
            return -float(surface.losses().clamp_min(1e-12).log().mean())

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[float, Tensor]:
        """See `Objective.value_and_gradient`."""
        mean, scale = point.gradients.mean, self._preconditioner(surface)
        num_tasks = len(point.losses)
        with surface.displaced(mean * scale, -1.0):
            ahead, gradient = surface.gradient(lambda losses: 1 / (num_tasks * losses.clamp_min(1e-12)))
        vector = gradient * scale
        length = self.epsilon * surface.norm() / float(vector.norm().clamp_min(1e-30))
        average = torch.full((num_tasks,), 1 / num_tasks, dtype=mean.dtype)
        with surface.displaced(vector, length):
            moved = surface.gradient(average)[1]
        return -float(ahead.clamp_min(1e-12).log().mean()), moved.sub_(mean).div_(length).sub_(gradient)

    def _preconditioner(self, surface: Surface) -> Tensor:
        """The step of the optimizer for a gradient of ones, shape (P,)."""
        optimizer = self.optimizer
        assert optimizer is not None
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        scales = []
        for parameter in surface.shared:
            group, state = groups[id(parameter)], optimizer.state.get(parameter, {})
            scale = torch.full_like(parameter, self.steps * group["lr"])
            if "exp_avg_sq" in state:
                corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                scale = scale / (corrected.sqrt() + group["eps"])
            scales.append(scale)
        return surface.flatten(scales)

    def __repr__(self) -> str:
        return f"LookAhead(steps={self.steps}, epsilon={self.epsilon})"


class LookAheadCallback(SymmetryTeleportCallback):
    """Teleports with `LookAhead`, which needs the optimizer of the fit."""

    def __init__(self, objective: LookAhead, **settings: Any) -> None:
        super().__init__(objective=objective, **settings)
        self.look_ahead = objective

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand over the optimizer."""
        super().on_fit_start(trainer, pl_module)
        self.look_ahead.optimizer = trainer.optimizers[0]

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget it."""
        super().teardown(trainer, pl_module, stage)
        self.look_ahead.optimizer = None


class RunningDirection(ConflictAlignment):
    """Follows a running mean of the default objective's gradients over teleports, and so over batches.

    Args:
        decay: Share of the mean that is kept at each new gradient.
        every: Evaluate the gradient only in every n-th teleport, and reuse the mean in between.
    """

    def __init__(self, decay: float, every: int = 1) -> None:
        super().__init__()
        self.decay, self.every = decay, every
        self._mean: Tensor | None = None
        self._calls = 0

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[float | None, Tensor]:
        """The value of the objective, and the running mean of its gradients."""
        if self._mean is None or self._calls % self.every == 0:
            value, gradient = super().value_and_gradient(surface, point)
            self._mean = gradient if self._mean is None else self._mean.lerp_(gradient, 1 - self.decay)
        else:
            value = self.value(surface, point)
        self._calls += 1
        return value, self._mean.clone()

    def __repr__(self) -> str:
        return f"RunningDirection(decay={self.decay}, every={self.every})"


class SoftMinimum(Objective):
    r"""A soft minimum of the cosines, which lifts all tasks in conflict at once instead of the worst one alone.

    It climbs along :math:`\sum_i w_i \nabla \cos \phi_{i0}` with :math:`w = \mathrm{softmax}(-\cos\phi_{\cdot 0} / T)`:
    a Hessian-vector product for the mean, and one for each task with a weight of 1 % or more. What has to grow is the
    smallest cosine itself.

    Args:
        temperature: :math:`T`. A small one leaves the worst task alone.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        self.temperature = temperature
        self._worst = ConflictAlignment()

    @override
    def value(self, surface: Surface, point: Point) -> float:
        return self._worst.value(surface, point)

    @override
    def aim(self, value: float) -> float:
        return self._worst.aim(value)

    @override
    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[float, Tensor]:
        gradients = point.gradients
        matrix, mean, norms, cosines = gradients.matrix, gradients.mean, gradients.norms, gradients.cosines
        weights = torch.softmax(-cosines / self.temperature, dim=0)
        unit, norm = mean / gradients.mean_norm, gradients.mean_norm
        turned = ((weights / norms) @ matrix - (weights @ cosines) * unit) / norm
        everyone = torch.full_like(weights, 1 / len(weights))
        total = hessian_vector(surface, everyone, mean, turned, EPSILON)
        for index, (row, weight) in enumerate(zip(matrix, weights.tolist(), strict=True)):
            if weight >= 0.01:
                vector = (unit - cosines[index] * row / norms[index]) * (weight / norms[index])
                only = torch.zeros_like(weights)
                only[index] = 1
                total.add_(hessian_vector(surface, only, row, vector, EPSILON))
        return self.value(surface, point), total

    def __repr__(self) -> str:
        return f"SoftMinimum(temperature={self.temperature})"
