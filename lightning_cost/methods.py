"""Multi-task methods that TorchJD does not have."""

from __future__ import annotations

from torch import Tensor
from torchjd.scalarization import Scalarizer
from typing_extensions import override

from lightning_cost._arguments import check_floating

__all__ = ["ScaleInvariant"]


class ScaleInvariant(Scalarizer):
    r"""The scale-invariant baseline (SI): the sum of the logarithms of the losses.

    .. math:: \sum_{k=1}^K \log L_k

    It weighs the gradient of each task by :math:`1 / L_k`, so that the scale of a loss does not matter. It is a
    baseline of `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_ (Navon et al., ICML 2022,
    Section 6) and of the tables of the COST paper.

    Raises:
        TypeError: When it is called, if the losses are no tensor of floating-point numbers.
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
        check_floating("values", values)
        # NaN passes: a gradient scaler expects it, and skips the step.
        if bool((values <= 0).any()):
            raise ValueError(
                f"ScaleInvariant takes the logarithm of every loss, so all must be positive; got {values.tolist()} in"
                " the order of the tasks. Shift a loss that can be negative, or use another method."
            )
        return values.log().sum()
