"""Which Trainers are supported, and what they do to losses and gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config as functorch_config
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from torch.optim import LBFGS, Optimizer

__all__: list[str] = []


def gradient_scaler(trainer: Trainer) -> Any:
    """The gradient scaler of ``precision="16-mixed"``, or ``None``."""
    return getattr(trainer.precision_plugin, "scaler", None)


def loss_scale_of(trainer: Trainer) -> float:
    """The factor that the gradient scaler puts before the loss; 1 without a scaler."""
    scaler = gradient_scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that shard parameters, reduce gradients in their own way or do not run eagerly.

    Raises:
        MisconfigurationException: If the strategy is not a single device or DDP, or averages models instead of
            gradients.
    """
    strategy = trainer.strategy
    # DeepSpeed and XLA subclass what is supported.
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(
        strategy, (DeepSpeedStrategy, SingleDeviceXLAStrategy)
    ):
        raise MisconfigurationException(
            "Task gradients need whole parameters and averaged gradients; got strategy"
            f" {type(strategy).__name__}. Use a single device, or `strategy='ddp'` (also 'ddp_spawn',"
            " 'ddp_find_unused_parameters_true')."
        )
    if getattr(strategy, "_model_averaging_period", None) is not None:
        raise MisconfigurationException(
            "Task gradients need gradients that are averaged at every step; DDPStrategy got `model_averaging_period`."
            " Leave it unset."
        )


def check_optimizer(module: LightningModule) -> Optimizer:
    """The only optimizer of a fit that starts.

    Raises:
        MisconfigurationException: If there are several, or one whose step is not an ordinary one.
    """
    trainer = module.trainer
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"Exactly one optimizer is supported; `configure_optimizers` returned {len(trainer.optimizers)}. Use"
            " parameter groups for different learning rates."
        )
    optimizer = trainer.optimizers[0]
    if isinstance(optimizer, LBFGS):
        raise MisconfigurationException("LBFGS is not supported: it evaluates its closure several times a step.")
    check_unscaling(trainer)
    return optimizer


def check_unscaling(trainer: Trainer) -> None:
    """Refuse optimizers that unscale the gradients of a gradient scaler themselves.

    Raises:
        MisconfigurationException: If there is a scaler and an optimizer is fused.
    """
    for optimizer in trainer.optimizers if gradient_scaler(trainer) is not None else ():
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            raise MisconfigurationException(
                f"A fused {type(optimizer).__name__} unscales the gradients inside its step, after they were replaced"
                f" by unscaled ones; got precision={trainer.precision!r}. Pass `fused=False`, or use 'bf16-mixed'."
            )


def keep_what_compiled_code_saves() -> None:
    """Have ``torch.compile`` make code that can be differentiated once a task.

    By default its backward may write over what its forward saved, so that it runs only once. That is decided when it is
    compiled, in a setting that belongs to the process: what was compiled with the other one is compiled again.
    """
    if getattr(functorch_config, "donated_buffer", False):
        functorch_config.donated_buffer = False
        torch._dynamo.reset()
