"""The task losses as a function of the shared parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import NoneType

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_cost._arguments import (
    as_bool,
    as_functions,
    as_names,
    as_parameters,
    as_shared,
    check_each,
    check_instance,
    check_number,
    check_shape,
)
from lightning_cost._training.accumulator import Accumulator, ExpectedNorms
from lightning_cost._training.autograd import task_gradient
from lightning_cost._training.evaluate import (
    Numerics,
    Scalarization,
    check_losses,
    checked_scalar,
    grads_are_finite,
    mean_losses,
    present,
    values_of,
)
from lightning_cost._vectors import (
    accumulate,
    assign,
    flatten,
    norm_of,
    num_elements,
    row_dtype,
    views,
    zeros_like_shared,
)
from lightning_cost.gradients import TaskGradients

__all__ = ["Point", "Surface"]

_ONE_EACH = "one element for each of the shared parameters"


@dataclass(frozen=True)
class Point:
    """Task losses, and task gradients if known, at one position.

    Attributes:
        losses: Task losses, shape ``(K,)``.
        evaluated: Task gradients, if they were evaluated.
    """

    losses: Tensor
    evaluated: TaskGradients | None = None

    @property
    def gradients(self) -> TaskGradients:
        """The task gradients.

        Raises:
            RuntimeError: If the search did not evaluate them.
        """
        if self.evaluated is None:
            raise RuntimeError(
                "The task gradients of this point were not evaluated. An objective that reads them must set"
                " `uses_task_gradients = True`."
            )
        return self.evaluated


class Surface:
    """The losses of :math:`K` tasks as a function of :math:`P` shared parameters.

    The values of the parameters are the position on the surface: moving writes into them. The surface knows no module
    and no Trainer. It takes functions that evaluate the losses, and they must be repeatable: called twice at the same
    position, they return the same losses.

    Args:
        batches: Functions without arguments that return the scalar task losses by name, with a graph; one per
            micro-batch. The surface is their mean. A single function stands for a single batch. A loss may be missing
            or ``None``: the task adds nothing in that batch.
        shared: The shared parameters.
        parameters: All parameters whose ``.grad`` :meth:`point` computes; ``None`` for the shared ones.
        scalarize: Turns the task losses into the scalar that ``.grad`` is the gradient of; ``None`` for their mean. If
            the scalar weighs all tasks equally, return it together with their common factor: this saves a backward
            pass.
        generator: Source of random numbers, on the CPU; ``None`` for one seeded with 0.
        numerics: What a Trainer does to losses and gradients; ``None`` for nothing.
        names: The tasks; ``None`` for those that the batches return at the first evaluation.

    Attributes:
        shared: The shared parameters.
        generator: The source of random numbers. Searches and objectives must not use the global generators, which every
            evaluation may rewind.
        ranks: The processes, over which losses and gradients are averaged.
        forwards: Number of forward passes so far.
        backwards: Number of backward passes so far.

    Example:
        >>> weight = Parameter(torch.tensor([1.0, 2.0]))
        >>> surface = Surface(lambda: {"left": weight[0] ** 2, "right": weight.sum()}, [weight])
        >>> surface.losses()
        tensor([1., 3.])
        >>> surface.point().gradients.matrix
        tensor([[2., 0.],
                [1., 1.]])
        >>> with surface.displaced(torch.tensor([1.0, 0.0])):
        ...     surface.losses()
        tensor([4., 4.])
    """

    def __init__(
        self,
        batches: Callable[[], Mapping[str, Tensor]] | Sequence[Callable[[], Mapping[str, Tensor]]],
        shared: Sequence[Parameter],
        parameters: Sequence[Parameter] | None = None,
        scalarize: Callable[[dict[str, Tensor]], Tensor | tuple[Tensor, float | None]] | None = None,
        generator: torch.Generator | None = None,
        numerics: Numerics | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._batches = [batches] if callable(batches) else as_functions("batches", batches, "lambda: losses(batch)")
        self.shared = as_shared("shared", shared)
        self._parameters = self.shared if parameters is None else as_parameters("parameters", parameters)
        if not {id(parameter) for parameter in self.shared} <= {id(parameter) for parameter in self._parameters}:
            raise ValueError("`parameters` must hold all parameters of `shared`; one is missing. Pass None for these.")
        check_instance("scalarize", scalarize, (Callable, NoneType), "a function of the task losses or None")
        check_instance("generator", generator, (torch.Generator, NoneType), "a torch.Generator or None")
        check_instance("numerics", numerics, (Numerics, NoneType), "a Numerics or None")
        self._scalarize = self._mean if scalarize is None else scalarize
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._numerics = Numerics() if numerics is None else numerics
        self.ranks = self._numerics.ranks
        self.forwards = 0
        self.backwards = 0
        self._names = () if names is None else as_names("names", names)
        self._strict = names is None
        self._held: Tensor | None = None

    @property
    def num_parameters(self) -> int:
        """The number :math:`P` of elements of the shared parameters."""
        return num_elements(self.shared)

    def position(self, out: Tensor | None = None) -> Tensor:
        """A copy of the shared parameters, shape ``(P,)``, in the memory of ``out`` if it is given."""
        values = [parameter.detach() for parameter in self.shared]
        if out is None:
            return self.flatten(values)
        check_shape("out", out, (self.num_parameters,), _ONE_EACH)
        assign(values, self.shared, out)
        return out

    def hold(self, position: Tensor | None) -> None:
        """Tell the surface its position, so that it need not copy it before it moves for a while.

        Args:
            position: What :meth:`position` returned. Do not write into it. ``None`` to forget it.
        """
        if position is not None:
            check_shape("position", position, (self.num_parameters,), _ONE_EACH)
        self._held = position

    @torch.no_grad()
    def move_to(self, position: Tensor) -> None:
        """Write a vector of shape ``(P,)`` into the shared parameters."""
        check_shape("position", position, (self.num_parameters,), _ONE_EACH)
        self._held = None
        torch._foreach_copy_(list(self.shared), views(position, self.shared))

    @torch.no_grad()
    def move_by(self, vector: Tensor, scale: float = 1.0) -> None:
        """Add ``scale`` times a vector of shape ``(P,)`` to the shared parameters."""
        check_shape("vector", vector, (self.num_parameters,), _ONE_EACH)
        check_number("scale", scale)
        self._held = None
        torch._foreach_add_(list(self.shared), views(vector, self.shared), alpha=scale)

    @contextmanager
    def displaced(self, vector: Tensor, scale: float = 1.0) -> Iterator[None]:
        """:meth:`move_by` for a while. On exit the shared parameters are exactly what they were."""
        held = self._held
        position = self.position() if held is None else held
        self.move_by(vector, scale)
        try:
            yield
        finally:
            self.move_to(position)
            self._held = held

    def norm(self) -> float:
        """The Euclidean norm of the shared parameters."""
        return norm_of(self.shared if self._held is None else [self._held])

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Concatenate one tensor per shared parameter into a vector of shape ``(P,)``. ``None`` stands for zeros."""
        check_each("tensors", tensors, self.shared)
        return flatten(tensors, self.shared)

    def standard_normal(self) -> Tensor:
        """A standard normal vector of shape ``(P,)``, drawn from ``generator``."""
        device, dtype = self.shared[0].device, row_dtype(self.shared)
        return torch.randn(self.num_parameters, generator=self.generator).to(device, dtype)

    def grads(self) -> list[Tensor | None]:
        """``.grad`` of every parameter. These are the tensors themselves: :meth:`point` makes new ones."""
        return [parameter.grad for parameter in self._parameters]

    def go_back(self, position: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Return to where :meth:`position` and :meth:`grads` were taken."""
        self.move_to(position)
        self.set_grads(grads)

    def set_grads(self, grads: Sequence[Tensor | None]) -> None:
        """Set ``.grad`` of every parameter to what :meth:`grads` returned."""
        check_each("grads", grads, self._parameters)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad

    def losses(self) -> Tensor:
        """The task losses here, shape ``(K,)``: one forward pass per batch.

        Gradients stay enabled, because a loss function may differentiate something itself.
        """
        with self.ranks.fail_together():
            seen = [self._forward(batch) for batch in self._batches]
        return mean_losses([self._values(losses) for losses in seen], self.ranks)

    def gradient(self, weights: Tensor | Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The gradient of a weighted sum of the task losses: one forward and one backward pass per batch.

        Args:
            weights: The weights, shape ``(K,)``, or a function of the losses that returns them.

        Returns:
            The losses, shape ``(K,)``, and the gradient, shape ``(P,)``.
        """
        # If no forward pass sees all losses, weights that depend on them need forward passes of their own.
        several = len(self._batches) > 1 or self.ranks.size > 1
        losses = self.losses() if callable(weights) and several else None
        total, seen, loss_scale = zeros_like_shared(self.shared), [], self._numerics.loss_scale
        with self.ranks.fail_together():
            for batch in self._batches:
                by_task = self._forward(batch)
                values = self._values(by_task)
                seen.append(values)
                chosen = weights(values if losses is None else losses) if callable(weights) else weights
                check_shape("weights", chosen, (len(self._names),), f"one for each of the tasks {list(self._names)}")
                pairs = zip(chosen.tolist(), self._names, strict=True)
                terms = [weight * by_task[name] for weight, name in pairs if weight != 0 and name in by_task]
                if terms:
                    summed = torch.stack(terms).sum() * loss_scale
                    accumulate(torch.autograd.grad(summed, self.shared, allow_unused=True), self.shared, total)
                    self.backwards += 1
        total = self.ranks.mean_(total.div_(len(self._batches) * loss_scale))
        return mean_losses(seen, self.ranks), total

    def hessian_vector_products(self, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Exact Hessians of weighted sums of the task losses, times vectors, by double backward.

        Args:
            weights: Weights of the task losses, each of shape ``(K,)``.
            vectors: One vector of shape ``(P,)`` for each of them.

        Returns:
            One product of shape ``(P,)`` for each.
        """
        if len(weights) != len(vectors):
            raise ValueError(f"`vectors` must hold one for each of `weights`, {len(weights)}; got {len(vectors)}.")
        for vector in vectors:
            check_shape("vectors", vector, (self.num_parameters,), _ONE_EACH)
        products, loss_scale = [zeros_like_shared(self.shared) for _ in vectors], self._numerics.loss_scale
        with self.ranks.fail_together():
            for batch in self._batches:
                by_task = self._forward(batch)
                for index, (weight, vector) in enumerate(zip(weights, vectors, strict=True)):
                    check_shape(
                        "weights", weight, (len(self._names),), f"one for each of the tasks {list(self._names)}"
                    )
                    pairs = zip(weight.tolist(), self._names, strict=True)
                    terms = [share * by_task[name] for share, name in pairs if share != 0 and name in by_task]
                    if not terms:
                        continue
                    loss = torch.stack(terms).sum() * loss_scale
                    gradients = task_gradient(loss, self.shared, create_graph=True)
                    pieces = zip(gradients, views(vector, self.shared), strict=True)
                    curved = [(g * v).sum() for g, v in pieces if g is not None and g.requires_grad]
                    if curved:
                        inner = torch.stack(curved).sum()
                        second = torch.autograd.grad(inner, self.shared, retain_graph=True, allow_unused=True)
                        accumulate(second, self.shared, products[index])
                    self.backwards += 2
        return [self.ranks.mean_(product.div_(len(self._batches) * loss_scale)) for product in products]

    def point(self, near: Point | None = None, spare: Tensor | None = None) -> Point:
        """The losses and task gradients here. Also sets ``.grad`` of every parameter.

        Args:
            near: A point with task gradients of about the same norms. It saves one backward pass.
            spare: A matrix of shape ``(K, P)`` whose memory may be reused for the task gradients.
        """
        point = self.point_if(lambda losses: True, near, spare)
        assert point is not None
        return point

    def point_if(
        self, admit: Callable[[Tensor], bool], near: Point | None = None, spare: Tensor | None = None
    ) -> Point | None:
        """:meth:`point`, but only if the losses are good enough.

        Args:
            admit: Gets the losses before anything is differentiated. If it returns ``False``, the result is ``None``.
            near: See :meth:`point`.
            spare: See :meth:`point`.
        """
        single = len(self._batches) == 1
        check_instance("admit", admit, Callable, "a function of the losses")
        check_instance("near", near, (Point, NoneType), "a Point with task gradients or None")
        check_instance("spare", spare, (Tensor, NoneType), "a tensor or None")
        if not single and not as_bool("admit", admit(self.losses())):
            return None
        self.set_grads([None] * len(self._parameters))
        expected = ExpectedNorms()
        if near is not None:
            expected.learn(near.gradients, dict(zip(self._names, near.losses.tolist(), strict=False)))
        accumulator = Accumulator(self.shared, expected, self._numerics, spare, strict=self._strict, keep_missing=True)
        seen, loss_scale = [], self._numerics.loss_scale
        for batch in self._batches:
            with self.ranks.fail_together():
                losses = self._forward(batch)
            values = self.ranks.mean_(self._values(losses))
            seen.append(values)
            if single and not as_bool("admit", admit(values)):
                return None
            self._differentiate(losses, accumulator, dict(zip(self._names, values.tolist(), strict=True)))
        self.ranks.mean_gradients_(self._parameters)
        gradients = accumulator.complete()
        assert gradients is not None
        self.scale_grads(1 / loss_scale)
        return Point(torch.stack(seen).mean(dim=0), gradients)

    def _differentiate(self, losses: dict[str, Tensor], accumulator: Accumulator, values: dict[str, float]) -> None:
        # No process fails alone here: a method sees the same losses on all of them.
        scalar = self._scalarize(losses)
        total, weight = checked_scalar(scalar)
        share, trained = 1 / len(self._batches), [p for p in self._parameters if p.requires_grad]

        def backward() -> None:
            if losses:
                # Not into `.grad` of anything else that the graph reaches: nobody would put it back.
                (total * (share * self._numerics.loss_scale)).backward(inputs=trained)

        with self.ranks.fail_together():
            self.backwards += accumulator.add(losses, weight, share, backward, values)

    def grads_are_finite(self) -> bool:
        """Whether ``.grad`` of every parameter is finite."""
        return grads_are_finite(self._parameters)

    def scale_grads(self, factor: float) -> None:
        """Multiply ``.grad`` of every parameter by a factor."""
        for parameter in self._parameters:
            if parameter.grad is not None and factor != 1:
                parameter.grad.mul_(factor)

    def _values(self, losses: dict[str, Tensor]) -> Tensor:
        if not self._names:
            raise ValueError("`batches` must return the loss of at least one task at the first evaluation; got none.")
        values = values_of(losses, self._names)
        return values if losses else values.to(self.shared[0].device)

    def _forward(self, batch: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        self.forwards += 1
        losses = check_losses(batch(), "A function in `batches`" if self._strict else "`task_losses`")
        unknown = [name for name in losses if name not in self._names]
        if self.forwards <= len(self._batches) and self._strict:
            # A batch may have a task that the ones before it lack.
            self._names += tuple(unknown)
        elif unknown and self._strict:
            raise ValueError(
                f"The batches must return the tasks {list(self._names)}, as at the first evaluation; got {unknown} as"
                " well. Return None for a task without a loss, so that all tasks are known."
            )
        return present(losses, self._names)

    def _mean(self, losses: dict[str, Tensor]) -> Scalarization:
        total = torch.stack(list(losses.values())).sum() / len(self._names)
        return Scalarization(total, 1 / len(self._names))
