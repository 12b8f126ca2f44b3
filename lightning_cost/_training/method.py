"""How a multi-task method turns task losses and task gradients into an update: one class for each kind of method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Parameter
from torchjd.aggregation import (
    Aggregator,
    GramianWeightedAggregator,
    WeightedAggregator,
)
from torchjd.scalarization import DWA, FAMO, Constant, Mean, Scalarizer, Sum
from typing_extensions import override

from lightning_cost._lightning.ranks import Ranks
from lightning_cost._training.evaluate import Scalarization
from lightning_cost._training.method_checks import check_aggregation, check_scalarization, check_tensor
from lightning_cost._training.method_state import tensors_off_cpu
from lightning_cost._training.narrowed import narrowed
from lightning_cost._vectors import columns, combine
from lightning_cost.gradients import TaskGradients

__all__: list[str] = []

# Scalarizing the mean of the losses equals the mean of the scalarizations: nothing need be communicated.
_LINEAR: tuple[type[Scalarizer], ...] = (Constant, Mean, Sum)
# What FAMO adds to a loss before it takes the logarithm.
_FAMO_EPSILON = 1e-8


class Method:
    """Linear scalarization, the default. Subclasses handle the other kinds of methods.

    Args:
        wrapped: The ``mtl_method`` of the module.

    Attributes:
        wrapped: The same.
        aggregates: Whether :meth:`aggregate` combines task gradients.
        keeps_weights: Whether an aggregator by weights must tell them.
        takes_features: Whether it changes the gradient of the features, by :meth:`FeatureMethod.change`.
        compares_losses: Whether :meth:`update` is called after each optimizer step.
        remembers_losses: Whether it would remember losses that are not finite.
    """

    aggregates = False
    compares_losses = False
    takes_features = False
    keeps_weights = False
    remembers_losses = False

    def __init__(self, wrapped: Any = None) -> None:
        self.wrapped = wrapped

    def scalarize(self, losses: Mapping[str, Tensor], names: Sequence[str], ranks: Ranks) -> Scalarization:
        """Scalarize the task losses. All processes must call it in the same order.

        Args:
            losses: Task losses with a graph, in the order of ``names``. A task without a loss is left out.
            names: All tasks.
            ranks: The processes; ``Ranks()`` in validation, where one process may see more batches than another.
        """
        values = _stacked(losses, ranks)
        total = values.mean() if len(values) == len(names) else values.sum() / len(names)
        return Scalarization(total, 1 / len(names))

    def aggregate(
        self, gradients: TaskGradients, names: Sequence[str], shared: Sequence[Parameter], ranks: Ranks
    ) -> Iterator[Tensor]:
        """The aggregation of the task gradients: one flat piece per shared parameter.

        Args:
            gradients: The gradients of the tasks that have one.
            names: All tasks.
            shared: The shared parameters.
            ranks: The processes.
        """
        raise NotImplementedError

    def end_epoch(self) -> None:
        """Called when an epoch has ended."""

    def update(self, before: Tensor, after: Tensor, names: Sequence[str], there: Sequence[bool]) -> None:
        """Learn from the task losses before and after an optimizer step.

        Args:
            before: The losses before it, shape ``(K,)``.
            after: The losses after it, shape ``(K,)``.
            names: The tasks.
            there: Which tasks had a loss in this step.
        """
        raise NotImplementedError


class ScalarizerMethod(Method):
    """A scalarizer: it weighs losses, not gradients."""

    wrapped: Scalarizer
    remembers_losses = True
    zero_for_missing = False
    """Whether a task without a loss counts as a loss of zero. Otherwise it is left out."""

    @override
    def scalarize(self, losses: Mapping[str, Tensor], names: Sequence[str], ranks: Ranks) -> Scalarization:
        """Scalarize the losses of all processes together; each process differentiates its own share.

        The scalarization of the mean losses is not the mean of the scalarizations. So the method gets the mean losses,
        and each process weighs its own losses by the derivatives of the method there. The average of the gradients,
        which DDP takes, then equals the gradient of one process with the whole batch. Some methods draw random numbers,
        which differ between the processes: the weights of rank 0 count.
        """
        values = _stacked(losses, ranks, None if len(losses) == len(names) else names)
        there = [name in losses for name in names]
        if ranks.size == 1 or type(self.wrapped) in _LINEAR:
            total, weights = self._differentiated(values, there)
            return Scalarization(total, None)
        zero = values - values.detach()
        flags = values.detach().new_tensor([float(flag) for flag in there])
        common = ranks.mean_(torch.cat([values.detach(), flags]))
        there = [share > 0 for share in common[len(names) :].tolist()]
        total, weights = self._differentiated(common[: len(names)] + zero, there)
        mine = torch.cat([weights, total.detach().reshape(1)])
        correction = ranks.broadcast_(mine.clone()) - mine
        return Scalarization(total + (correction[:-1] * zero).sum() + correction[-1], None)

    def _differentiated(self, values: Tensor, there: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """The scalarization of all losses, and its derivatives, shape ``(K,)``.

        Raises:
            ValueError: If one of them is not finite, although the losses are.
        """
        total, weights, figures = self._weighed(values, there)
        check_scalarization(values, total, weights, torch.isfinite(figures).tolist())
        return total, weights

    def _weighed(self, values: Tensor, there: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """The same unchecked, and two figures: the sum of the losses, and one that is finite if the rest is."""
        kept = [index for index, flag in enumerate(there) if flag]
        if not values.requires_grad:
            # This process has no loss. Its derivatives are needed to agree with the others.
            values = values.detach().requires_grad_()
        every = self.zero_for_missing or type(self.wrapped) in _LINEAR or len(kept) == len(there)
        with narrowed(self.wrapped, range(len(there)) if every else kept, len(there)):
            total = check_tensor(self.wrapped(values if every else values[kept]), ())
            weights = torch.zeros_like(values)
            if total.requires_grad:
                (weights,) = torch.autograd.grad(
                    total, values, retain_graph=True, allow_unused=True, materialize_grads=True
                )
        figures = torch.stack([values.detach().sum(), total.detach().to(values) + weights.detach().sum()])
        return total, weights, figures


class DwaMethod(ScalarizerMethod):
    """DWA compares the mean losses of the last two epochs. A loss of zero stands for a missing one in the mean."""

    wrapped: DWA
    zero_for_missing = True

    @override
    def end_epoch(self) -> None:
        self.wrapped.step()


class FamoMethod(ScalarizerMethod):
    """FAMO learns its weights from the losses before and after each optimizer step."""

    wrapped: FAMO
    compares_losses = True
    remembers_losses = False

    @override
    def _differentiated(self, values: Tensor, there: Sequence[bool]) -> tuple[Tensor, Tensor]:
        flags = torch.tensor(list(there), device=values.device)
        total, weights, figures = self._weighed(values, there)
        is_below = self._is_below(flags, values.detach())
        below, *finite = torch.cat([is_below.reshape(1), torch.isfinite(figures)]).tolist()
        if below:
            self._refuse(values)
        check_scalarization(values, total, weights, finite)
        return total, weights

    @override
    def update(self, before: Tensor, after: Tensor, names: Sequence[str], there: Sequence[bool]) -> None:
        """Update the logits. A task without a loss keeps its logit.

        Raises:
            ValueError: If a loss is below its lower bound.
        """
        lowest, method = self.wrapped.min_losses.to(before), self.wrapped
        flags = torch.tensor(list(there), device=before.device)
        is_finite = torch.isfinite(after).all()
        finite, *below = torch.stack([is_finite, self._is_below(flags, before), self._is_below(flags, after)]).tolist()
        if not finite:
            # The logits would never recover. The next training step says what is wrong, or the gradient scaler does.
            return
        if any(below):
            self._refuse(before if below[0] else after)
        if not all(there):
            # FAMO compares the progress of each task with the weighted mean. A missing task gets just this mean.
            weights = torch.softmax(method._w.detach(), dim=0) * flags
            progress = (before - lowest + _FAMO_EPSILON).log() - (after - lowest + _FAMO_EPSILON).log()
            mean = (weights * progress.where(flags, 0.0)).sum() / weights.sum()
            before = before.where(flags, lowest + 1 - _FAMO_EPSILON)
            after = after.where(flags, lowest + (-mean).exp() - _FAMO_EPSILON)
        # The last call may have been for one of several micro-batches, or for the point that a teleport left.
        with torch.no_grad():
            method(before)
            logits = method._w.clone()
            method.update(after)
            method._w.copy_(torch.where(flags, method._w, logits))

    def _is_below(self, flags: Tensor, losses: Tensor) -> Tensor:
        return ((losses < self.wrapped.min_losses.to(losses)) & flags).any()

    def _refuse(self, losses: Tensor) -> NoReturn:
        raise ValueError(
            "FAMO takes the logarithm of the difference between each loss and its `min_losses`, which are"
            f" {self.wrapped.min_losses.tolist()} in the order of the tasks. The losses are {losses.tolist()}. Pass"
            " lower bounds of the losses as `min_losses`."
        )


class AggregatorMethod(Method):
    """An aggregator: it combines task gradients of the shared parameters. Other parameters follow the summed loss."""

    wrapped: Aggregator
    aggregates = True
    weights: tuple[tuple[str, ...], Tensor] | None = None
    """The tasks and weights of the last aggregation; ``None`` if it was none by weights."""

    @override
    def scalarize(self, losses: Mapping[str, Tensor], names: Sequence[str], ranks: Ranks) -> Scalarization:
        return Scalarization(_stacked(losses, ranks).sum(), 1.0)

    @override
    def aggregate(
        self, gradients: TaskGradients, names: Sequence[str], shared: Sequence[Parameter], ranks: Ranks
    ) -> Iterator[Tensor]:
        """See :meth:`Method.aggregate`.

        Methods that weigh the rows by their Gramian get the Gramian that is known already. If such a method has hooks,
        it is called itself, because hooks expect that. Some methods draw random numbers, which differ between the
        processes: the result of rank 0 counts.
        """
        # Most methods compute on the CPU anyway, or read from a GPU in each of their iterations.
        gramian = gradients.gramian if tensors_off_cpu(self.wrapped) else gradients.gramian_on_host
        result, weights = self._combined(gradients, gramian, names)
        if weights is None:
            assert result is not None
            yield from columns(ranks.broadcast_(result), shared)
            return
        weights = ranks.broadcast_(weights.to(gradients.matrix))
        self.weights = gradients.names, weights
        for piece in columns(gradients.matrix, shared):
            yield combine(piece, weights)

    def _combined(
        self, gradients: TaskGradients, gramian: Tensor, names: Sequence[str]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The aggregation, or else the weights of the rows in it."""
        method, matrix, self.weights = self.wrapped, gradients.matrix, None
        kept = [names.index(name) for name in gradients.names]
        if len(kept) == 1 < len(names):
            # Nothing to weigh.
            return None, matrix.new_ones(1)
        with narrowed(method, kept, len(names)):
            if isinstance(method, GramianWeightedAggregator) and not _is_hooked(method):
                return None, check_aggregation(method.gramian_weighting(gramian), (len(kept),))
            if self.keeps_weights and isinstance(method, WeightedAggregator) and weighs(method):
                return None, check_aggregation(method.weighting(matrix), (len(kept),))
            return check_aggregation(method(matrix), (matrix.shape[1],)), None


class FeatureMethod(AggregatorMethod):
    """An aggregator of the gradients of the features. One backward pass then takes its result to the parameters."""

    aggregates = False
    takes_features = True
    remembers_losses = True

    def change(self, rows: TaskGradients, names: Sequence[str], ranks: Ranks) -> Tensor | None:
        """What turns the summed gradient of the features into the aggregation.

        The rows of the processes belong to different samples, so their Gramians are summed.

        Args:
            rows: The gradients of the features of this process, one row for each of ``names``.
            names: All tasks.
            ranks: The processes.

        Returns:
            A vector of the length of a row; ``None`` if a row is not finite.
        """
        self.weights = None
        # The loss of all processes is their mean, so the gradient of a sample has a factor of one over their number.
        gramian = ranks.mean_(rows.gramian.clone()) / ranks.size
        gramian = gramian if tensors_off_cpu(self.wrapped) else gramian.cpu()
        if not bool(torch.isfinite(gramian).all()):
            return None
        found = [index for index, square in enumerate(gramian.diagonal().tolist()) if square > 0]
        if not found:
            return torch.zeros_like(rows.matrix[0])
        kept = rows.select([names[index] for index in found])
        result, weights = self._combined(kept, gramian[found][:, found], names)
        if weights is not None:
            weights = ranks.broadcast_(weights.to(kept.matrix))
            self.weights = kept.names, weights
            result = combine(kept.matrix, weights)
        assert result is not None
        return result - rows.matrix.sum(dim=0)


def _stacked(losses: Mapping[str, Tensor], ranks: Ranks, names: Sequence[str] | None = None) -> Tensor:
    """The losses as one tensor, with zeros for the tasks of ``names`` that have none."""
    zero = next((torch.zeros_like(loss) for loss in losses.values()), torch.zeros((), device=ranks.device))
    if names is None:
        return torch.stack(list(losses.values())) if losses else zero.expand(1)
    return torch.stack([losses.get(name, zero) for name in names])


def write_gradient(pieces: Iterable[Tensor], shared: Sequence[Parameter], loss_scale: float = 1.0) -> None:
    """Write one flat piece per shared parameter into its ``.grad``.

    Args:
        pieces: The pieces.
        shared: The shared parameters.
        loss_scale: The factor that ``.grad`` has while a gradient scaler has not unscaled it.
    """
    for parameter, piece in zip(shared, pieces, strict=True):
        # A parameter that no task reaches has no gradient, and optimizers skip it. With zeros its weights would decay.
        if parameter.grad is None:
            continue
        view = piece.view(parameter.shape)
        if loss_scale != 1:
            view = view * loss_scale
        if parameter.grad.is_sparse:
            parameter.grad = view.to(parameter.dtype).sparse_mask(parameter.grad.coalesce())
        else:
            parameter.grad.copy_(view)


def weighs(method: Any) -> bool:
    """Whether an aggregator combines the rows by weights, and nothing else."""
    return (
        isinstance(method, WeightedAggregator)
        and type(method).forward is WeightedAggregator.forward
        and not _is_hooked(method)
    )


def _is_hooked(method: WeightedAggregator) -> bool:
    """Whether the method must be called itself, because somebody waits for the call."""
    if type(method).forward is not WeightedAggregator.forward:
        return True
    return any((*module._forward_hooks, *module._forward_pre_hooks) for module in (method, method.weighting))


def make_method(wrapped: Any, of_features: bool = False, keeps_weights: bool = False) -> Method:
    """The class that goes with an ``mtl_method``.

    Args:
        wrapped: The ``mtl_method``.
        of_features: Whether an aggregator gets the gradients of the features.
        keeps_weights: Whether the weights of an aggregator are needed.

    Raises:
        MisconfigurationException: If it is no multi-task method.
    """
    kinds: list[tuple[type, type[Method]]] = [
        (type(None), Method),
        (Aggregator, FeatureMethod if of_features else AggregatorMethod),
        (FAMO, FamoMethod),
        (DWA, DwaMethod),
        (Scalarizer, ScalarizerMethod),
    ]
    for kind, method in kinds:
        if isinstance(wrapped, kind):
            made = method(wrapped)
            made.keeps_weights = keeps_weights
            return made
    raise MisconfigurationException(
        "`mtl_method` must be a torchjd.aggregation.Aggregator, a torchjd.scalarization.Scalarizer or None for the"
        f" mean of the losses; got {wrapped!r}."
    )
