"""Task gradients of the shared parameters: what conflict is measured on, and what multi-task methods aggregate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_cost._arguments import as_names, check_among, check_floating
from lightning_cost._min_norm import shortest_combination
from lightning_cost._vectors import combine

__all__ = ["TaskGradients"]

_PIECE = 2**16
# Of a product of long rows in single precision, relative to their norms.
_ROUNDING = 1e-4


class TaskGradients:
    r"""The gradients of :math:`K` task losses with respect to :math:`P` shared parameters.

    ``MultiTaskMixin.task_gradients`` holds those of the current optimizer step. The next step overwrites their
    ``matrix``; use :meth:`clone` to keep them.

    Symbols are those of the paper: :math:`g_i` is the gradient of task :math:`i`, and :math:`g_0` is the mean of all
    (Definition 1). It is always the mean, even if another multi-task method computes the update: no task conflicts with
    the aggregate of a conflict-free method.

    Args:
        names: The :math:`K` task names: the tasks that had a loss in this step.
        matrix: Tensor of shape :math:`(K, P)` with one row per task, in the order of ``names``. The columns are the
            elements of the shared parameters that the optimizer trains, flattened and concatenated in the order of
            their registration.

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
        check_floating("matrix", matrix)
        names = as_names("names", names)
        if matrix.ndim != 2 or matrix.shape[0] != len(names):
            raise ValueError(
                f"`matrix` must have shape (number of tasks, number of shared parameters) with {len(names)} rows, one"
                f" for each of the tasks {list(names)}; got shape {tuple(matrix.shape)}."
            )
        self.names = names
        self.matrix = matrix

    @cached_property
    def gramian(self) -> Tensor:
        r"""Inner products :math:`g_i \cdot g_j`, shape :math:`(K, K)`."""
        if self.matrix.is_cuda:
            # Not one matrix product: PyTorch may be set to round the inputs of those to TF32.
            return torch.stack([self.matrix.mv(row) for row in self.matrix])
        gramian = self.matrix.new_zeros(len(self.names), len(self.names))
        # All rows of a piece fit into the cache. This takes half the time of a product of the whole.
        for piece in self.matrix.split(_PIECE, dim=1):
            gramian.addmm_(piece, piece.T)
        return gramian

    @cached_property
    def gramian_on_host(self) -> Tensor:
        """:attr:`gramian` on the CPU. All that the library asks of a step comes from this one read of the device."""
        return self.gramian.cpu()

    @cached_property
    def norms(self) -> Tensor:
        r"""Euclidean norms :math:`\|g_i\|`, shape :math:`(K,)`."""
        return self.gramian.diagonal().clamp_min(0).sqrt()

    @cached_property
    def mean(self) -> Tensor:
        r"""The mean gradient :math:`g_0`, shape :math:`(P,)`.

        Raises:
            ValueError: If there is no task.
        """
        self._check_tasks()
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
        # Not from the Gramian: conflicting gradients cancel in their mean, but rounding errors of the Gramian do not.
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
    def pareto_stationarity(self) -> Tensor:
        r"""The norm of the shortest convex combination of the task gradients, a scalar.

        .. math:: \min_{\alpha \ge 0, \sum_i \alpha_i = 1} \Big\| \sum_i \alpha_i g_i \Big\|

        It is 0 where no direction decreases all losses to first order: the shared parameters are *Pareto stationary*.
        Theorem 1 is about this. It is never larger than :attr:`mean_norm`, nor than the smallest of :attr:`norms`, so a
        task without a gradient makes it 0. (Désidéri, 2012; MGDA updates with this vector.)

        Raises:
            ValueError: If there is no task, or a gradient that is not finite.

        Example:
            >>> import torch
            >>> TaskGradients(["left", "right"], torch.eye(2)).pareto_stationarity
            tensor(0.7071)
        """
        self._check_tasks()
        if not bool(torch.isfinite(self.matrix).all()):
            raise ValueError(
                "`pareto_stationarity` needs finite task gradients; look at `is_finite` first. With a gradient scaler,"
                " they may overflow, and the scaler skips the step."
            )
        return shortest_combination(self.matrix)[1].to(self.matrix)

    @cached_property
    def is_finite(self) -> bool:
        """Whether the gradients of all tasks are finite, and their inner products as well."""
        return bool(torch.isfinite(self.gramian_on_host).all())

    def select(self, names: Sequence[str]) -> TaskGradients:
        """The gradients of some of the tasks; the object itself if these are all of them, in their order."""
        names = as_names("names", names)
        if names == self.names:
            return self
        for name in names:
            check_among("names", name, "the tasks", self.names)
        return TaskGradients(names, self.matrix[[self.names.index(name) for name in names]])

    @cached_property
    def with_gradient(self) -> TaskGradients:
        """The tasks whose gradient is not zero. A task without labels in a batch, for example, is left out.

        Triggers get these tasks only, and aggregators combine these only. It may hold no task at all.
        """
        squares = self.gramian_on_host.diagonal().tolist()
        return self.select([name for name, square in zip(self.names, squares, strict=True) if not square <= 0])

    @cached_property
    def conflicts(self) -> tuple[bool, ...]:
        r"""Whether each task conflicts with the mean: :math:`\cos \phi_{i0} < 0` (Definition 1).

        The Gramian decides this unless its rounding might change a sign. Then :attr:`cosines` decides.

        Raises:
            ValueError: If there is no task.
        """
        self._check_tasks()
        gramian = self.gramian_on_host.double()
        norms = gramian.diagonal().clamp_min(0).sqrt()
        products, scales = gramian.sum(dim=1), norms * norms.sum()
        if bool((products.abs() > _ROUNDING * scales).logical_or(norms == 0).all()):
            return tuple((products < 0).tolist())
        return tuple((self.cosines < 0).tolist())

    def _check_tasks(self) -> None:
        if not self.names:
            raise ValueError("TaskGradients without tasks have no mean. Pass the gradients of at least one task.")

    def clone(self) -> TaskGradients:
        """A copy that later steps do not overwrite."""
        return TaskGradients(self.names, self.matrix.clone())

    def __repr__(self) -> str:
        return f"TaskGradients(names={list(self.names)}, shape={tuple(self.matrix.shape)})"


def _safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / denominator.masked_fill(zero, 1.0)).clamp(-1.0, 1.0)
