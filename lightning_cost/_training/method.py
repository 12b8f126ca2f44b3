"""How a multi-task method turns task losses and task gradients into an update: one class for each kind of method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import Parameter
from torchjd.aggregation import (
    Aggregator,
    GramianWeightedAggregator,
    MoDoWeighting,
    SDMGradWeighting,
    WeightedAggregator,
)
from torchjd.scalarization import DWA, FAMO, Constant, Mean, Scalarizer, Sum
from typing_extensions import override

from lightning_cost._lightning.ranks import Ranks
from lightning_cost._training.evaluate import Scalarization
from lightning_cost._training.method_state import changed_without_backward, of_unknown_state
from lightning_cost._vectors import columns, combine
from lightning_cost.gradients import TaskGradients

__all__: list[str] = []

# Scalarizing the mean of the losses equals the mean of the scalarizations: nothing need be communicated.
_LINEAR: tuple[type[Scalarizer], ...] = (Constant, Mean, Sum)


class Method:
    """Linear scalarization, the default. Subclasses handle the other kinds of methods.

    Args:
        wrapped: The ``mtl_method`` of the module.

    Attributes:
        wrapped: The same.
        aggregates: Whether :meth:`aggregate` combines task gradients.
        compares_losses: Whether :meth:`update` is called after each optimizer step.
    """

    aggregates = False
    compares_losses = False

    def __init__(self, wrapped: Any = None) -> None:
        self.wrapped = wrapped

    def scalarize(self, values: Tensor, ranks: Ranks) -> Scalarization:
        """Scalarize the task losses. All processes must call it in the same order.

        Args:
            values: Task losses with a graph, shape ``(K,)``.
            ranks: The processes; ``Ranks()`` in validation, where one process may see more batches than another.
        """
        return Scalarization(values.mean(), 1 / len(values))

    def aggregate(self, gradients: TaskGradients, shared: Sequence[Parameter], ranks: Ranks) -> Iterator[Tensor]:
        """The aggregation of the task gradients: one flat piece per shared parameter."""
        raise NotImplementedError

    def end_epoch(self) -> None:
        """Called when an epoch has ended."""

    def update(self, before: Tensor, after: Tensor, names: Sequence[str]) -> None:
        """Learn from the task losses before and after an optimizer step, both of shape ``(K,)``."""
        raise NotImplementedError


class ScalarizerMethod(Method):
    """A scalarizer: it weighs losses, not gradients."""

    wrapped: Scalarizer

    @override
    def scalarize(self, values: Tensor, ranks: Ranks) -> Scalarization:
        """Scalarize the losses of all processes together; each process differentiates its own share.

        The scalarization of the mean losses is not the mean of the scalarizations. So the method gets the mean losses,
        and each process weighs its own losses by the derivatives of the method there. The average of the gradients,
        which DDP takes, then equals the gradient of one process with the whole batch. Some methods draw random numbers,
        which differ between the processes: the weights of rank 0 count.
        """
        if ranks.size == 1 or type(self.wrapped) in _LINEAR:
            return Scalarization(self.wrapped(values), None)
        zero = values - values.detach()
        common = ranks.mean_(values.detach().clone()) + zero
        total = self.wrapped(common)
        (weights,) = torch.autograd.grad(total, common, retain_graph=True, allow_unused=True, materialize_grads=True)
        mine = torch.cat([weights, total.detach().reshape(1)])
        correction = ranks.broadcast_(mine.clone()) - mine
        return Scalarization(total + (correction[:-1] * zero).sum() + correction[-1], None)


class DwaMethod(ScalarizerMethod):
    """DWA compares the mean losses of the last two epochs."""

    wrapped: DWA

    @override
    def end_epoch(self) -> None:
        self.wrapped.step()


class FamoMethod(ScalarizerMethod):
    """FAMO learns its weights from the losses before and after each optimizer step."""

    wrapped: FAMO
    compares_losses = True

    @override
    def update(self, before: Tensor, after: Tensor, names: Sequence[str]) -> None:
        """Update the logits.

        Raises:
            ValueError: If a loss is below its lower bound.
        """
        if not bool(torch.isfinite(after).all()):
            # The logits would never recover. The next training step says what is wrong, or the gradient scaler does.
            return
        lowest = self.wrapped.min_losses.to(before)
        if bool((torch.minimum(before, after) < lowest).any()):
            raise ValueError(
                "FAMO takes the logarithm of the difference between each loss and its `min_losses`, which are"
                f" {lowest.tolist()} for the tasks {list(names)}. The losses are {before.tolist()} before the optimizer"
                f" step and {after.tolist()} after it. Pass lower bounds of the losses as `min_losses`."
            )
        # The last call may have been for one of several micro-batches, or for the point that a teleport left.
        with torch.no_grad():
            self.wrapped(before)
        self.wrapped.update(after)


class AggregatorMethod(Method):
    """An aggregator: it combines task gradients of the shared parameters. Other parameters follow the summed loss."""

    wrapped: Aggregator
    aggregates = True

    @override
    def scalarize(self, values: Tensor, ranks: Ranks) -> Scalarization:
        return Scalarization(values.sum(), 1.0)

    @override
    def aggregate(self, gradients: TaskGradients, shared: Sequence[Parameter], ranks: Ranks) -> Iterator[Tensor]:
        """See :meth:`Method.aggregate`.

        Methods that weigh the rows by their Gramian get the Gramian that is known already. If such a method has hooks,
        it is called itself, because hooks expect that. Some methods draw random numbers, which differ between the
        processes: the result of rank 0 counts.
        """
        method, matrix = self.wrapped, gradients.matrix
        if (
            not isinstance(method, GramianWeightedAggregator)
            or type(method).forward is not WeightedAggregator.forward
            or any((*module._forward_hooks, *module._forward_pre_hooks) for module in (method, method.weighting))
        ):
            yield from columns(ranks.broadcast_(method(matrix)), shared)
            return
        weights = ranks.broadcast_(method.gramian_weighting(gradients.gramian)).to(matrix)
        for piece in columns(matrix, shared):
            yield combine(piece, weights)


def write_gradient(pieces: Iterable[Tensor], shared: Sequence[Parameter]) -> None:
    """Write one flat piece per shared parameter into its ``.grad``."""
    for parameter, piece in zip(shared, pieces, strict=True):
        # A parameter that no task reaches has no gradient, and optimizers skip it. With zeros its weights would decay.
        if parameter.grad is None:
            continue
        view = piece.view(parameter.shape)
        if parameter.grad.is_sparse:
            parameter.grad = view.to(parameter.dtype).sparse_mask(parameter.grad.coalesce())
        else:
            parameter.grad.copy_(view)


def make_method(wrapped: Any) -> Method:
    """The class that goes with an ``mtl_method``.

    Raises:
        MisconfigurationException: If it is no multi-task method.
    """
    kinds: list[tuple[type, type[Method]]] = [
        (type(None), Method),
        (Aggregator, AggregatorMethod),
        (FAMO, FamoMethod),
        (DWA, DwaMethod),
        (Scalarizer, ScalarizerMethod),
    ]
    for kind, method in kinds:
        if isinstance(wrapped, kind):
            return method(wrapped)
    raise MisconfigurationException(
        "`mtl_method` must be a torchjd.aggregation.Aggregator, a torchjd.scalarization.Scalarizer or None for the"
        f" mean of the losses; got {wrapped!r}."
    )


def check_method(method: nn.Module, module: LightningModule) -> None:
    """Refuse methods that cannot be trained like this.

    Raises:
        MisconfigurationException: If the method needs several batches a step, or if parameters of it are in no
            optimizer.
    """
    for part in method.modules():
        if isinstance(part, (MoDoWeighting, SDMGradWeighting)):
            raise MisconfigurationException(
                f"{type(part).__name__} weighs the tasks by the products of their gradients on two independent batches,"
                " but a training step has one batch. Use another method, such as torchjd.aggregation.MGDA."
            )
    trained = {
        parameter
        for optimizer in module.trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    by_itself = changed_without_backward(method)
    missing = [
        f"mtl_method.{name}"
        for name, parameter in method.named_parameters()
        if parameter.requires_grad and parameter not in trained and name not in by_itself
    ]
    if missing:
        raise MisconfigurationException(
            f"{type(method).__name__} learns {', '.join(missing)}, but no optimizer has it. Pass `self.parameters()` to"
            " the optimizer in `configure_optimizers`, not only the parameters of the network."
        )
    for name in of_unknown_state(method):
        rank_zero_warn(
            f"The library does not know what {name} remembers from step to step. A checkpoint holds its parameters and"
            " buffers only, and a resumed run starts without the rest. Give it `get_extra_state` and `set_extra_state`"
            " (of torch.nn.Module) to save the rest."
        )
