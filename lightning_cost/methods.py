"""Multi-task methods that TorchJD does not have, and scalarization over several processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchjd.scalarization import Constant, Mean, Scalarizer, Sum
from typing_extensions import override

from lightning_cost.distributed import Ranks

__all__ = ["ScaleInvariant"]

# Their value of the mean losses is the mean of their values: nothing need be communicated.
_LINEAR: tuple[type[Scalarizer], ...] = (Constant, Mean, Sum)


class ScaleInvariant(Scalarizer):
    r"""The scale-invariant baseline (SI): the sum of the logarithms of the losses.

    .. math:: \sum_{k=1}^K \log L_k

    Its gradient weighs that of each task by :math:`1 / L_k`, so that the scale of a loss does not matter. It is a
    baseline of `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_ (Navon et al., ICML 2022,
    Section 6) and of the tables of the COST paper.

    Raises:
        ValueError: When it is called, if a loss is not positive.

    Example:
        >>> import torch
        >>> losses = torch.tensor([2.0, 0.5, 4.0], requires_grad=True)
        >>> total = ScaleInvariant()(losses)
        >>> total.backward()
        >>> losses.grad
        tensor([0.5000, 2.0000, 0.2500])
    """

    @override
    def forward(self, values: Tensor, /) -> Tensor:
        """The sum of the logarithms of the losses.

        Args:
            values: Positive losses, of any shape.

        Returns:
            A scalar.
        """
        # What is not a number passes: a gradient scaler expects it, and skips the step.
        if bool((values <= 0).any()):
            raise ValueError(
                f"ScaleInvariant takes the logarithm of every loss, so that all must be positive; got {values.tolist()}"
                " in the order of the tasks. Shift a loss that can be negative, or use another method."
            )
        return values.log().sum()


def scalarize(method: Scalarizer, values: Tensor, ranks: Ranks) -> Tensor:
    """The scalarization of the losses of all processes together, to be differentiated on each for its own share.

    The mean over the processes of a function is not the function of the mean. So the method sees the mean losses, and
    each process differentiates its own with the weights that they have there: averaged over the processes, as DDP does,
    that is the gradient of one process with the whole batch. Some methods draw random numbers, which differ between the
    processes, so that the first process decides for all.

    Args:
        method: The method.
        values: The losses of this process with a graph, shape ``(K,)``.
        ranks: The processes.

    Returns:
        A scalar, of the same value on every process if there are several and the method is not linear.
    """
    if ranks.size == 1 or type(method) in _LINEAR:
        return method(values)
    zero = values - values.detach()
    common = ranks.mean_(values.detach().clone()) + zero
    total = method(common)
    (weights,) = torch.autograd.grad(total, common, retain_graph=True, allow_unused=True, materialize_grads=True)
    mine = torch.cat([weights, total.detach().reshape(1)])
    correction = ranks.first_(mine.clone()) - mine
    return total + (correction[:-1] * zero).sum() + correction[-1]
