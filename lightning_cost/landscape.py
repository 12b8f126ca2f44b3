"""The task losses of recorded batches as a function of the shared parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_cost.distributed import Ranks
from lightning_cost.gradients import (
    GradientBuffer,
    TaskGradients,
    accumulate,
    flatten,
    norm_of,
    num_elements,
    row_dtype,
    task_gradient,
    views,
)
from lightning_cost.mixin import MultiTaskMixin, TaskLosses
from lightning_cost.replay import RecordedBatch
from lightning_cost.support import loss_scale_of

__all__ = ["Landscape", "Point"]


@dataclass(frozen=True)
class Point:
    """What is known of the task losses where the shared parameters are.

    Attributes:
        losses: Task losses, shape ``(K,)``.
        evaluated: Their gradients with respect to the shared parameters, if they are known.
    """

    losses: Tensor
    evaluated: TaskGradients | None = None

    @property
    def gradients(self) -> TaskGradients:
        """The task gradients; an error if the search did not evaluate them."""
        if self.evaluated is None:
            raise RuntimeError(
                "The task gradients of this point were not evaluated: an objective that reads them must set"
                " `uses_task_gradients = True`."
            )
        return self.evaluated


class Landscape:
    """The task losses of recorded batches, averaged over them, as a function of the :math:`P` shared parameters.

    The parameters of the module are the position: :meth:`move_to` writes into them. Every evaluation of a batch starts
    from the random state that it was recorded with, so that dropout masks are those of the training step.

    Args:
        module: The module, whose buffers and metrics the caller preserves.
        batches: The recorded batches, at least one.
        generator: Source of the random numbers of a search, on the CPU.

    Attributes:
        module: The module.
        shared: The shared parameters.
        ranks: The processes, over which losses and gradients are averaged.
        generator: See above. The global generators will not do: every evaluation rewinds them.
        forwards: Number of forward passes so far.
        backwards: Number of backward passes so far.
    """

    def __init__(self, module: MultiTaskMixin, batches: Sequence[RecordedBatch], generator: torch.Generator) -> None:
        if not batches:
            raise ValueError("`batches` must hold at least one recorded batch; got none.")
        self.module = module
        self._batches = list(batches)
        self._parameters = list(module.parameters())
        self.shared = module.shared_parameters()
        self.generator = generator
        self.ranks = Ranks.of(module)
        self.forwards = 0
        self.backwards = 0

    @property
    def num_parameters(self) -> int:
        """The number :math:`P` of elements of the shared parameters."""
        return num_elements(self.shared)

    def position(self) -> Tensor:
        """A copy of the shared parameters, shape ``(P,)``."""
        return flatten([parameter.detach() for parameter in self.shared], self.shared)

    @torch.no_grad()
    def move_to(self, position: Tensor) -> None:
        """Write a vector of shape ``(P,)`` into the shared parameters."""
        for parameter, view in zip(self.shared, views(position, self.shared), strict=True):
            parameter.copy_(view)

    @torch.no_grad()
    def move_by(self, vector: Tensor, scale: float = 1.0) -> None:
        """Add ``scale`` times a vector of shape ``(P,)`` to the shared parameters."""
        for parameter, view in zip(self.shared, views(vector, self.shared), strict=True):
            parameter.add_(view, alpha=scale)

    @contextmanager
    def displaced(self, vector: Tensor, scale: float = 1.0) -> Iterator[None]:
        """:meth:`move_by` for a while: on exit the shared parameters are exactly what they were."""
        position = self.position()
        self.move_by(vector, scale)
        try:
            yield
        finally:
            self.move_to(position)

    def norm(self) -> float:
        """The Euclidean norm of the shared parameters."""
        return norm_of(self.shared)

    def standard_normal(self) -> Tensor:
        """A standard normal vector of shape ``(P,)``, from the generator of the search."""
        return torch.randn(self.num_parameters, generator=self.generator).to(self._zeros())

    def grads(self) -> list[Tensor | None]:
        """``.grad`` of every parameter of the module: the tensors themselves, since evaluations make new ones."""
        return [parameter.grad for parameter in self._parameters]

    def go_back(self, position: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Return to where :meth:`position` and :meth:`grads` were taken."""
        self.move_to(position)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad

    def losses(self) -> Tensor:
        """The task losses here, shape ``(K,)``: one forward pass a batch.

        With gradients enabled, which a ``task_losses`` that differentiates something itself relies on.
        """
        with self.ranks.together():
            values = self._mean([self._forward(batch).values for batch in self._batches])
        return self.ranks.mean_(values)

    def gradient(self, weights: Tensor | Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The gradient of a weighted sum of the task losses: one forward and one backward pass a batch.

        Args:
            weights: The weights, shape ``(K,)``, or a function of the losses that returns them.

        Returns:
            The losses, shape ``(K,)``, and the gradient, shape ``(P,)``.
        """
        # Where one forward pass does not see all losses, the weights take passes of their own.
        several = len(self._batches) > 1 or self.ranks.size > 1
        losses = self.losses() if callable(weights) and several else None
        total, seen, loss_scale = self._zeros(), [], self._loss_scale()
        with self.ranks.together():
            for batch in self._batches:
                step = self._forward(batch)
                seen.append(step.values)
                chosen = weights(step.values if losses is None else losses) if callable(weights) else weights
                terms = [
                    weight * loss
                    for weight, loss in zip(chosen.tolist(), step.by_task.values(), strict=True)
                    if weight != 0
                ]
                if terms:
                    summed = torch.stack(terms).sum() * loss_scale
                    accumulate(torch.autograd.grad(summed, self.shared, allow_unused=True), self.shared, total)
                    self.backwards += 1
        return self.ranks.mean_(self._mean(seen)), self.ranks.mean_(total.div_(len(self._batches) * loss_scale))

    def hessian_vector_products(self, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Exact Hessians of weighted sums of the task losses, times vectors, by differentiating twice.

        Args:
            weights: Weights of the task losses, each of shape ``(K,)``.
            vectors: One vector for each of them, shape ``(P,)``.

        Returns:
            One product for each, shape ``(P,)``.
        """
        products, loss_scale = [self._zeros() for _ in vectors], self._loss_scale()
        with self.ranks.together():
            for batch in self._batches:
                values = torch.stack(list(self._forward(batch).by_task.values())) * loss_scale
                for index, (weight, vector) in enumerate(zip(weights, vectors, strict=True)):
                    loss = (weight.to(values) * values).sum()
                    gradients = task_gradient("weighted sum", loss, self.shared, create_graph=True)
                    pieces = zip(gradients, views(vector, self.shared), strict=True)
                    curved = [(g * v).sum() for g, v in pieces if g is not None and g.requires_grad]
                    if curved:
                        inner = torch.stack(curved).sum()
                        second = torch.autograd.grad(inner, self.shared, retain_graph=True, allow_unused=True)
                        accumulate(second, self.shared, products[index])
                    self.backwards += 2
        return [self.ranks.mean_(product.div_(len(self._batches) * loss_scale)) for product in products]

    def point(self, buffer: GradientBuffer, admits: Callable[[Tensor], bool] | None = None) -> Point | None:
        """The losses and task gradients here, and ``.grad`` of every parameter of the module.

        Args:
            buffer: Where the task gradients go.
            admits: Asked about the losses before anything is differentiated; on ``False`` the answer is ``None``.
        """
        if admits is not None and len(self._batches) > 1 and not admits(self.losses()):
            return None
        for parameter in self._parameters:
            parameter.grad = None
        seen, scale, loss_scale = [], 1 / len(self._batches), self._loss_scale()
        for batch in self._batches:
            with self.ranks.together():
                losses = self._forward(batch)
            values = self.ranks.mean_(losses.values)
            seen.append(values)
            if admits is not None and len(self._batches) == 1 and not admits(values):
                return None
            # Here no process fails alone: the method sees the same losses on all of them.
            with self.module.trainer.precision_plugin.train_step_context():
                step = self.module.scalarize(losses)
            with self.ranks.together():
                self.backwards += 1 + buffer.add(step.by_task, self.shared, scale, step.weight, values, loss_scale)
                (step.total * (scale * loss_scale)).backward()
        self.ranks.mean_gradients_(self._parameters)
        gradients = buffer.complete(self.ranks, loss_scale, self.module.reduce_dtype)
        self._scale_grads(1 / loss_scale)
        return Point(self._mean(seen), gradients)

    def scale(self, buffer: GradientBuffer, factor: float) -> None:
        """Multiply the task gradients of a buffer and ``.grad`` of every parameter of the module by a factor."""
        buffer.scale(factor)
        self._scale_grads(factor)

    def _scale_grads(self, factor: float) -> None:
        for parameter in self._parameters:
            if parameter.grad is not None and factor != 1:
                parameter.grad.mul_(factor)

    def _loss_scale(self) -> float:
        return loss_scale_of(self.module.trainer)

    def _forward(self, batch: RecordedBatch) -> TaskLosses:
        self.forwards += 1
        return batch.replay(self.module)

    def _mean(self, losses: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(losses)).mean(dim=0)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.num_parameters, device=self.shared[0].device, dtype=row_dtype(self.shared))


def grads_are_finite(module: nn.Module) -> bool:
    """Whether ``.grad`` of every parameter of a module is finite."""
    grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    values = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    return math.isfinite(norm_of(values))
