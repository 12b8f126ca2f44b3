"""Methods as the code behind published tables has them, where that differs from TorchJD."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchjd.aggregation import FairGradWeighting, GramianWeightedAggregator, Weighting
from torchjd.linalg import PSDMatrix
from typing_extensions import override

from lightning_cost import MultiTaskMixin

__all__ = ["IMTLLossScales", "PublicFairGrad"]


class _TimesTasksClipped(Weighting[PSDMatrix]):
    """Weights times the number of tasks, and less where the weighted gradient would be longer than a norm."""

    def __init__(self, weighting: Weighting[PSDMatrix], max_norm: float) -> None:
        super().__init__()
        self.weighting, self.max_norm = weighting, max_norm

    @override
    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        weights = len(gramian) * self.weighting(gramian)
        norm = (weights @ gramian @ weights).clamp_min(0).sqrt()
        # As `torch.nn.utils.clip_grad_norm_` does.
        return weights * (self.max_norm / (norm + 1e-6)).clamp_max(1)


class PublicFairGrad(GramianWeightedAggregator):
    """FairGrad of its public code, which is the baseline of the COST paper and what its COST is added to.

    The weights are those of FairGrad times the number of tasks. The result is clipped, which is that of the *shared*
    parameters only: `Trainer(gradient_clip_val=...)` would clip the heads with them. With Adam, the factor matters only
    together with the clipping.

    Args:
        alpha: Fairness; 2 in its scripts for CelebA and QM9.
        max_norm: Largest norm of the gradient of the shared parameters; 1 in its code.

    Raises:
        ValueError: If an argument is not positive and finite.
        ImportError: If `torchjd[fairgrad]` is not installed.
    """

    def __init__(self, alpha: float = 2.0, max_norm: float = 1.0) -> None:
        for name, value in {"alpha": alpha, "max_norm": max_norm}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite.")
        super().__init__(_TimesTasksClipped(FairGradWeighting(alpha=alpha), max_norm))
        self.alpha, self.max_norm = alpha, max_norm

    def __repr__(self) -> str:
        return f"PublicFairGrad(alpha={self.alpha}, max_norm={self.max_norm})"


class IMTLLossScales(Callback):
    r"""The half of IMTL that scales the losses, beside an aggregator that is the other half.

    A trained parameter :math:`s_k` a task makes the loss :math:`e^{s_k} L_k` of about the same size for all tasks
    (IMTL-L; Liu et al., *Towards Impartial Multi-task Learning*, ICLR 2021). With `torchjd.aggregation.IMTLG` as the
    `mtl_method`, this is IMTL. The value of a task loss is :math:`e^{s_k} L_k`. Its derivative by :math:`s_k` is that
    of :math:`e^{s_k} L_k - s_k`. So a teleport that keeps it to 2 % keeps :math:`L_k` to 2 %.

    The optimizer must get all parameters of the module (`self.parameters()`), and the losses must be positive.

    Args:
        num_tasks: Number of tasks, in the order in which `task_losses` returns them.

    Raises:
        TypeError: In `setup`, if the module is no MultiTaskMixin.
        ValueError: In the first step, if the number of tasks is another one.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"num_tasks={num_tasks} must be at least 1.")
        self.num_tasks = num_tasks

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module the scales, before its optimizer is made."""
        if not isinstance(pl_module, MultiTaskMixin):
            raise TypeError(f"IMTLLossScales needs a MultiTaskMixin; got {type(pl_module).__name__}.")
        if hasattr(pl_module, "loss_scales"):
            return
        pl_module.loss_scales = nn.Parameter(torch.zeros(self.num_tasks, device=pl_module.device))
        unscaled = pl_module.task_losses

        def task_losses(batch: Any, batch_idx: int) -> dict[str, Tensor]:
            losses, scales = unscaled(batch, batch_idx), pl_module.loss_scales
            if len(losses) != self.num_tasks:
                raise ValueError(f"num_tasks={self.num_tasks} must be the number of tasks; got {list(losses)}.")
            pairs = zip(losses.items(), scales, strict=True)
            return {name: scale.exp() * loss - (scale - scale.detach()) for (name, loss), scale in pairs}

        pl_module.task_losses = task_losses  # type: ignore[method-assign]
