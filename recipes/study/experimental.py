"""Ideas that studies try, beyond what the library offers: see `docs/evidence.md` for what became of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_cost import MultiTaskMixin, SymmetryTeleportCallback
from lightning_cost.gradients import TaskGradients, flatten
from lightning_cost.landscape import Landscape, Point
from lightning_cost.objectives import Objective
from lightning_cost.triggers import Trigger, dominated_conflict

__all__ = ["EpochTeleportCallback", "LookAhead", "RunningDirection", "SmoothedTrigger"]


class EpochTeleportCallback(SymmetryTeleportCallback):
    """Teleports in some epochs only.

    Args:
        epochs: The epochs, counted from 0.
        **settings: See `SymmetryTeleportCallback`.
    """

    def __init__(self, epochs: Collection[int], **settings: Any) -> None:
        super().__init__(start_epoch=0, **settings)
        self.epochs = frozenset(epochs)

    def __repr__(self) -> str:
        return f"{super().__repr__()} in epochs {sorted(self.epochs)}"

    @override
    def should_check(self, trainer: L.Trainer, pl_module: MultiTaskMixin) -> bool:
        """Whether it is one of the epochs, and the schedule agrees."""
        return trainer.current_epoch in self.epochs and super().should_check(trainer, pl_module)


class SmoothedTrigger:
    """A trigger that looks at the running mean of the task gradients instead of those of one batch.

    The mean is no part of a checkpoint.

    Args:
        trigger: The trigger.
        decay: Share of the mean that is kept at each check, in [0, 1).
    """

    def __init__(self, trigger: Trigger = dominated_conflict, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1); got {decay!r}.")
        self.trigger = trigger
        self.decay = decay
        self._mean: Tensor | None = None

    def __call__(self, gradients: TaskGradients) -> bool:
        """Whether the trigger holds for the mean, this check's gradients included."""
        if self._mean is None:
            self._mean = gradients.matrix.clone()
        else:
            self._mean.lerp_(gradients.matrix, 1 - self.decay)
        return self.trigger(TaskGradients(gradients.names, self._mean))

    def __repr__(self) -> str:
        return f"SmoothedTrigger({getattr(self.trigger, '__name__', self.trigger)}, decay={self.decay})"


class LookAhead(Objective):
    r"""How much one step of Adam lowers the losses: :math:`-\frac1K\sum_i \log L_i(\theta - \eta P g_0(\theta))`.

    :math:`P` is the preconditioner of the optimizer's second moment, or 1 where it has none, and :math:`\eta` its
    learning rate. The gradient holds :math:`P` fixed: with :math:`g'` the gradient at the point ahead, it is
    :math:`g' - \eta H_0 P g'`, which takes three forward and two backward passes with a finite difference.

    Args:
        steps: Length of the look, in steps of the optimizer.
        epsilon: Length of the finite difference, relative to the norm of the shared parameters.
    """

    def __init__(self, steps: float = 1.0, epsilon: float = 5e-3) -> None:
        self.steps = steps
        self.epsilon = epsilon

    def value(self, landscape: Landscape, point: Point) -> float:
        """Minus the mean logarithm of the losses one step ahead."""
        with landscape.displaced(point.gradients.mean * self._preconditioner(landscape), -1.0):
            return -float(landscape.losses().clamp_min(1e-12).log().mean())

    def value_and_gradient(self, landscape: Landscape, point: Point) -> tuple[float, Tensor]:
        """See `Objective.value_and_gradient`."""
        mean, scale = point.gradients.mean, self._preconditioner(landscape)
        num_tasks = len(point.losses)
        with landscape.displaced(mean * scale, -1.0):
            ahead, gradient = landscape.gradient(lambda losses: 1 / (num_tasks * losses.clamp_min(1e-12)))
        vector = gradient * scale
        length = self.epsilon * landscape.norm() / float(vector.norm().clamp_min(1e-30))
        average = torch.full((num_tasks,), 1 / num_tasks, dtype=mean.dtype)
        with landscape.displaced(vector, length):
            moved = landscape.gradient(average)[1]
        curved = moved.sub_(mean).div_(length)
        return -float(ahead.clamp_min(1e-12).log().mean()), curved.sub_(gradient)

    def _preconditioner(self, landscape: Landscape) -> Tensor:
        """The step of the optimizer for a gradient of ones, shape `(P,)`."""
        optimizer = landscape.module.trainer.optimizers[0]
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        scales = []
        for parameter in landscape.shared:
            group, state = groups[id(parameter)], optimizer.state.get(parameter, {})
            scale = torch.full_like(parameter, self.steps * group["lr"])
            if "exp_avg_sq" in state:
                corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                scale = scale / (corrected.sqrt() + group["eps"])
            scales.append(scale)
        return flatten(scales, landscape.shared)

    def __repr__(self) -> str:
        return f"LookAhead(steps={self.steps}, epsilon={self.epsilon})"


class RunningDirection(Objective):
    """Climbs along a running mean of an objective's gradients: those of earlier teleports, on other batches, count too.

    Args:
        objective: The objective.
        decay: Share of the mean that is kept at each new gradient, in [0, 1).
        every: Evaluate the gradient in every n-th teleport only, and reuse the mean in between.
    """

    def __init__(self, objective: Objective, decay: float = 0.8, every: int = 1) -> None:
        self.objective = objective
        self.decay = decay
        self.every = every
        self.uses_task_gradients = objective.uses_task_gradients
        self._mean: Tensor | None = None
        self._calls = 0

    def begin(self, landscape: Landscape, start: Point) -> None:
        """Prepare the objective."""
        self.objective.begin(landscape, start)

    def value(self, landscape: Landscape, point: Point) -> float | None:
        """The value of the objective."""
        return self.objective.value(landscape, point)

    def aim(self, value: float) -> float:
        """What the objective aims at."""
        return self.objective.aim(value)

    def value_and_gradient(self, landscape: Landscape, point: Point) -> tuple[float | None, Tensor]:
        """The value of the objective, and the running mean of its gradients."""
        if self._mean is None or self._calls % self.every == 0:
            value, gradient = self.objective.value_and_gradient(landscape, point)
            self._mean = gradient if self._mean is None else self._mean.lerp_(gradient, 1 - self.decay)
        else:
            value = self.objective.value(landscape, point)
        self._calls += 1
        return value, self._mean.clone()

    def __repr__(self) -> str:
        return f"RunningDirection({self.objective!r}, decay={self.decay}, every={self.every})"
