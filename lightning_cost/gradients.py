"""Task gradients of the shared parameters: what conflict is measured on, and what multi-task methods aggregate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter

from lightning_cost.distributed import Ranks

__all__ = ["TaskGradients"]

_PIECE = 2**16


class TaskGradients:
    r"""The gradients of :math:`K` task losses with respect to :math:`P` shared parameters.

    ``MultiTaskMixin.task_gradients`` holds the ones of the current optimizer step. Its ``matrix`` is a preallocated
    buffer that the next step overwrites: :meth:`clone` keeps a copy.

    Symbols are those of the paper: :math:`g_i` is the gradient of task :math:`i` and :math:`g_0` their mean
    (Definition 1). The mean is meant even where another multi-task method does the update: against the aggregate of a
    conflict-free method no task ever conflicts.

    Args:
        names: The :math:`K` task names.
        matrix: Tensor of shape :math:`(K, P)`, one row a task, in the order of ``names``. A column is an element of the
            shared parameters, flattened and concatenated in their order of registration.

    Example:
        >>> import torch
        >>> gradients = TaskGradients(["left", "right"], torch.tensor([[3.0, 4.0], [-1.0, 0.0]]))
        >>> gradients.norms
        tensor([5., 1.])
        >>> gradients.mean
        tensor([1., 2.])
        >>> gradients.cosines
        tensor([ 0.9839, -0.4472])
    """

    def __init__(self, names: Sequence[str], matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != len(names):
            raise ValueError(
                f"`matrix` must have shape (number of tasks, number of shared parameters) with {len(names)} rows, one"
                f" for each of the tasks {list(names)}; got shape {tuple(matrix.shape)}."
            )
        self.names = tuple(names)
        self.matrix = matrix

    @cached_property
    def gramian(self) -> Tensor:
        r"""Inner products :math:`g_i \cdot g_j`, shape :math:`(K, K)`."""
        if self.matrix.is_cuda:
            # Not one matrix product: PyTorch may be set to round its inputs to TF32.
            return torch.stack([self.matrix.mv(row) for row in self.matrix])
        gramian = self.matrix.new_zeros(len(self.names), len(self.names))
        # All rows of a piece fit into the cache: half the time of a product of the whole.
        for piece in self.matrix.split(_PIECE, dim=1):
            gramian.addmm_(piece, piece.T)
        return gramian

    @cached_property
    def norms(self) -> Tensor:
        r"""Euclidean norms :math:`\|g_i\|`, shape :math:`(K,)`."""
        return self.gramian.diagonal().clamp_min(0).sqrt()

    @cached_property
    def mean(self) -> Tensor:
        r"""The mean gradient :math:`g_0`, shape :math:`(P,)`."""
        return combine(self.matrix, self.matrix.new_full((len(self.names),), 1 / len(self.names)))

    @cached_property
    def mean_norm(self) -> Tensor:
        r"""Norm :math:`\|g_0\|` of the mean gradient, a scalar."""
        norm: Tensor = self.mean.norm()
        return norm

    @cached_property
    def cosines(self) -> Tensor:
        r"""Cosines :math:`\cos \phi_{i0}` of each task gradient with the mean :math:`g_0`, shape :math:`(K,)`.

        Negative means dominated conflict (Definition 1). A task without gradient has cosine 0.
        """
        # The Gramian would do, were it exact: conflicting gradients cancel in their mean, its rounding errors do not.
        return _safe_divide(self.matrix @ self.mean, self.norms * self.mean_norm)

    @cached_property
    def pairwise_cosines(self) -> Tensor:
        r"""Cosines :math:`\cos \phi_{ij}` between the task gradients, shape :math:`(K, K)`.

        Negative means weak conflict (Definition 1). A task without gradient has cosine 0 with every task.
        """
        gramian = self.gramian.cpu().double()
        norms = gramian.diagonal().clamp_min(0).sqrt()
        return _safe_divide(gramian, norms[:, None] * norms[None, :]).to(self.matrix)

    @cached_property
    def is_finite(self) -> bool:
        """Whether the gradients of all tasks are finite."""
        return bool(torch.isfinite(self.gramian).all())

    def clone(self) -> TaskGradients:
        """A copy that later steps do not overwrite."""
        return TaskGradients(self.names, self.matrix.clone())

    def __repr__(self) -> str:
        return f"TaskGradients(names={list(self.names)}, shape={tuple(self.matrix.shape)})"


def _safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / denominator.masked_fill(zero, 1.0)).clamp(-1.0, 1.0)


def flatten(tensors: Sequence[Tensor | None], shared: Sequence[Parameter]) -> Tensor:
    """Concatenate one tensor a shared parameter (``None`` stands for zeros) into a vector of shape ``(P,)``."""
    out = torch.empty(num_elements(shared), device=shared[0].device, dtype=row_dtype(shared))
    assign(tensors, shared, out)
    return out


def assign(tensors: Sequence[Tensor | None], shared: Sequence[Parameter], out: Tensor) -> None:
    """Write one tensor a shared parameter (``None`` stands for zeros) into a vector of shape ``(P,)``."""
    for view, tensor in zip(views(out, shared), tensors, strict=True):
        if tensor is None:
            view.zero_()
        else:
            view.copy_(tensor.to_dense() if tensor.is_sparse else tensor)


def accumulate(tensors: Sequence[Tensor | None], shared: Sequence[Parameter], out: Tensor, factor: float = 1.0) -> None:
    """Add ``factor`` times one tensor a shared parameter (``None`` stands for zeros) to a vector of shape ``(P,)``."""
    for view, tensor in zip(views(out, shared), tensors, strict=True):
        if tensor is not None:
            view.add_(tensor, alpha=factor)


def combine(matrix: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the rows of a matrix, shape ``(P,)``.

    For few and very long rows, adding them up takes a third of the time of the matrix product.
    """
    weights = weights.to(matrix)
    combined = matrix[0] * weights[0]
    for row, weight in zip(matrix[1:], weights[1:], strict=True):
        combined.addcmul_(row, weight)
    return combined


def views(vector: Tensor, shared: Sequence[Parameter]) -> Iterator[Tensor]:
    """The slices of a ``(P,)`` vector that belong to each shared parameter, in its shape."""
    for piece, parameter in zip(columns(vector, shared), shared, strict=True):
        yield piece.view(parameter.shape)


def columns(matrix: Tensor, shared: Sequence[Parameter]) -> Sequence[Tensor]:
    """The slices of a ``(..., P)`` tensor that belong to each shared parameter, flat."""
    pieces: Sequence[Tensor] = matrix.split([parameter.numel() for parameter in shared], dim=-1)
    return pieces


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all elements of some tensors."""
    return float(torch.nn.utils.get_total_norm([tensor.detach() for tensor in tensors]))


def num_elements(shared: Sequence[Parameter]) -> int:
    """The number :math:`P` of elements of the shared parameters."""
    return sum(parameter.numel() for parameter in shared)


def row_dtype(shared: Sequence[Parameter]) -> torch.dtype:
    """At least float32, whatever the parameters are stored in: cosines of half-precision rows are noise."""
    dtype = torch.float32
    for parameter in shared:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


class GradientBuffer:
    """Collects the task gradients of one optimizer step, over its micro-batches, in one preallocated matrix.

    Reverse mode needs one backward pass a task, and the ordinary backward that fills the gradients of the heads is one
    more. Where the scalarized loss weighs the tasks equally, that pass also holds the sum of all rows, so that one row
    is had by subtraction. Subtraction rounds relative to the sum of the rows, to which the largest row is no smaller
    than a :math:`K`-th. So it is the row that is expected to be the largest, by its loss in this step and its norm for
    its loss in the step before: a task that a batch weighs differently, or lacks, shows it in both. The first step
    differentiates every task.

    Each micro-batch takes an :meth:`add`, then its ordinary backward; the last one also :meth:`complete`.

    Attributes:
        rates: Norm of a task's gradient over its absolute loss, by name, when its loss was last not zero.
    """

    def __init__(self) -> None:
        self._matrix: Tensor | None = None
        self._names: tuple[str, ...] = ()
        self._shared: list[Parameter] = []
        self.rates: dict[str, float] = {}
        self._losses: list[float] = []
        self._derived: int | None = None
        self._touched: set[Tensor] = set()
        self._weight: float | None = None
        self._open = False
        self._gradients: TaskGradients | None = None

    @property
    def is_open(self) -> bool:
        """Whether gradients were added that no optimizer step has used yet."""
        return self._open

    @property
    def shared(self) -> list[Parameter]:
        """The shared parameters that the columns belong to."""
        return self._shared

    @property
    def gradients(self) -> TaskGradients | None:
        """The task gradients that were completed last; ``None`` before the first, and while more are added."""
        return self._gradients

    def add(
        self,
        losses: Mapping[str, Tensor],
        shared: Sequence[Parameter],
        scale: float,
        weight: float | None,
        values: Tensor | None = None,
        loss_scale: float = 1.0,
    ) -> int:
        """Add the task gradients of a micro-batch. Its ordinary backward must follow.

        Args:
            losses: Scalar task losses with a graph, which is kept.
            shared: The shared parameters.
            scale: Factor of this micro-batch, one over the number of micro-batches.
            weight: The common factor of the task losses in the scalarized loss; ``None`` if they differ.
            values: The losses that say which row is the largest, averaged over the processes so that all take the same;
                ``None`` for ``losses``.
            loss_scale: Factor that keeps half-precision gradients from vanishing on the way. The rows are without it,
                ``.grad`` must have it when the matrix is completed.

        Returns:
            The number of backward passes, one a task or one less.

        Raises:
            RuntimeError: If a task has no gradient with respect to any shared parameter.
        """
        # Rows go with `.grad`: where that was cleared, an interrupted step left the rows behind.
        cleared = all(parameter.grad is None for parameter in shared)
        first = cleared or not self._open
        if first:
            # Subtraction needs a `.grad` that holds nothing but these losses. It holds more if the task gradients were
            # asked for between micro-batches, or if a parameter is not in the optimizer, which would clear it.
            self._begin(losses, list(shared), weight, cleared, values)
        assert self._matrix is not None
        passes = 0
        for index, (name, loss) in enumerate(losses.items()):
            if index == self._derived:
                touched = reachable(loss).intersection(self._shared)
                if not touched:
                    raise no_gradient(name)
                self._touched |= touched
                continue
            passes += 1
            gradients = task_gradient(name, loss, self._shared, scale * loss_scale)
            row = self._matrix[index]
            if first:
                assign(gradients, self._shared, row)
                if loss_scale != 1:
                    row.mul_(1 / loss_scale)
            else:
                accumulate(gradients, self._shared, row, 1 / loss_scale)
        self._gradients = None
        return passes

    def complete(
        self, ranks: Ranks | None = None, loss_scale: float = 1.0, sent_dtype: torch.dtype | None = None
    ) -> TaskGradients:
        """Finish the matrix after the ordinary backward of the last micro-batch.

        Args:
            ranks: The processes that average their rows. Their ``.grad`` must be averaged already.
            loss_scale: The factor in ``.grad``, see :meth:`add`.
            sent_dtype: What to send the rows as; ``None`` for their own type.
        """
        assert self._matrix is not None
        derived = self._derived
        if ranks is not None and ranks.size > 1:
            # The derived row comes from `.grad`: it need not be sent.
            for block in (self._matrix,) if derived is None else (self._matrix[:derived], self._matrix[derived + 1 :]):
                ranks.mean_(block, sent_dtype)
            if derived is not None:
                flags = ranks.union([parameter in self._touched for parameter in self._shared])
                self._touched = {parameter for parameter, flag in zip(self._shared, flags, strict=True) if flag}
        if derived is not None:
            self._subtract_others(derived, loss_scale)
        self._gradients = TaskGradients(self._names, self._matrix)
        if derived is not None:
            dtypes = (self._matrix.dtype, self._matrix.dtype if sent_dtype is None else sent_dtype)
            self._silence_rounding(derived, max(torch.finfo(dtype).eps for dtype in dtypes))
        return self._gradients

    def scale(self, factor: float) -> None:
        """Multiply the completed task gradients by a factor."""
        assert self._matrix is not None
        self._matrix.mul_(factor)
        self._gradients = TaskGradients(self._names, self._matrix)

    def close(self) -> None:
        """Mark the gradients as used: the next :meth:`add` starts anew. They stay readable until then."""
        if self._gradients is not None and self._gradients.is_finite:
            self._learn(self._gradients, self._losses)
        self._open = False
        self._derived = None

    def discard(self) -> None:
        """Discard what was added, but not what is known of the size of the gradients."""
        self._open = False
        self._gradients = None
        self._derived = None

    def restart(self, expected: TaskGradients | None = None, losses: Sequence[float] = ()) -> None:
        """Discard what was added.

        Args:
            expected: Task gradients that are expected to be about those to come; without them the next :meth:`add`
                differentiates every task.
            losses: The task losses that they belong to.
        """
        self.discard()
        self.rates = {}
        if expected is not None:
            self._learn(expected, losses)

    def _learn(self, gradients: TaskGradients, losses: Sequence[float]) -> None:
        for name, norm, loss in zip(gradients.names, gradients.norms.tolist(), losses, strict=True):
            if loss != 0:
                self.rates[name] = norm / abs(loss)

    def _begin(
        self,
        losses: Mapping[str, Tensor],
        shared: list[Parameter],
        weight: float | None,
        derive: bool,
        values: Tensor | None,
    ) -> None:
        self._names = tuple(losses)
        self._losses = (torch.stack([loss.detach() for loss in losses.values()]) if values is None else values).tolist()
        shape = (len(losses), num_elements(shared))
        like = shared[0]
        dtype = row_dtype(shared)
        if (
            self._matrix is None
            or self._matrix.shape != shape
            or self._matrix.device != like.device
            or self._matrix.dtype != dtype
        ):
            self._matrix = torch.empty(shape, device=like.device, dtype=dtype)
        self._shared = shared
        self._weight = weight
        self._derived = self._expected_largest() if derive and weight is not None and len(losses) > 1 else None
        self._touched = set()
        self._open = True

    def _expected_largest(self) -> int | None:
        if not self.rates.keys() >= set(self._names):
            return None
        norms = [self.rates[name] * abs(loss) for name, loss in zip(self._names, self._losses, strict=True)]
        largest = max(norms)
        return norms.index(largest) if 0 < largest < math.inf else None

    def _subtract_others(self, index: int, loss_scale: float) -> None:
        assert self._matrix is not None
        assert self._weight is not None
        weight = self._weight * loss_scale
        others = [row for row in range(len(self._names)) if row != index]
        for parameter, block in zip(self._shared, columns(self._matrix, self._shared), strict=True):
            # One parameter after the other, so that most of a block stays in the cache.
            derived = block[index]
            if parameter.grad is None or parameter not in self._touched:
                derived.zero_()
                continue
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            torch.sub(gradient.reshape(-1), block[others[0]], alpha=weight, out=derived)
            for other in others[1:]:
                derived.sub_(block[other], alpha=weight)
            if weight != 1:
                derived.div_(weight)

    def _silence_rounding(self, index: int, eps: float) -> None:
        """Set a row to zero that is no larger than the rounding of the subtraction: its direction is noise."""
        assert self._matrix is not None
        assert self._gradients is not None
        norms = self._gradients.norms
        if norms[index] <= 4 * len(norms) * eps * norms.max():
            self._matrix[index].zero_()
            self._gradients = TaskGradients(self._names, self._matrix)


def task_gradient(
    name: str, loss: Tensor, shared: Sequence[Parameter], scale: float = 1.0, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradient of ``scale * loss`` with respect to each shared parameter, ``None`` where the task does not touch it.

    Raises:
        RuntimeError: If the task has no gradient with respect to any shared parameter.
    """
    gradients: tuple[Tensor | None, ...] = (None,)
    if loss.requires_grad:
        gradients = torch.autograd.grad(
            loss,
            shared,
            grad_outputs=None if scale == 1.0 else torch.full_like(loss, scale),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    if all(gradient is None for gradient in gradients):
        raise no_gradient(name)
    return gradients


def no_gradient(name: str) -> RuntimeError:
    """The error for a task that has no gradient with respect to any shared parameter."""
    return RuntimeError(
        f"The loss of task {name!r} has no gradient with respect to the shared parameters. Compute it from the output"
        " of `shared_module` without detaching it; if the backbone uses reentrant activation checkpointing, pass"
        " `use_reentrant=False`."
    )


def reachable(loss: Tensor) -> set[Tensor]:
    """The leaves that the graph of a loss leads to, without differentiating it."""
    if not loss.requires_grad:
        return set()
    start = get_gradient_edge(loss).node
    leaves, seen, pending = set(), {start}, [start]
    while pending:
        node = pending.pop()
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.add(node.variable)  # type: ignore[attr-defined]
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        pending.extend(new)
    return leaves
