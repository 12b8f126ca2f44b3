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
    """The factor by which the gradient scaler multiplies the loss; 1 without a scaler."""
    scaler = gradient_scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def check_package(of: type, what: str) -> None:
    """Refuse a class of the package ``pytorch_lightning``, whose classes are others than those of ``lightning``.

    Args:
        of: The class.
        what: What it should be, such as ``"LightningModule"``.

    Raises:
        TypeError: If it is refused.
    """
    for base in of.__mro__:
        if base.__module__.split(".")[0] == "pytorch_lightning":
            raise TypeError(
                f"{of.__name__} comes from the package `pytorch_lightning` ({base.__module__}.{base.__name__}), which"
                f" does not go together with `lightning`. Use `lightning.pytorch.{what}`, and import all of Lightning"
                " from `lightning.pytorch`."
            )


def check_automatic_optimization(module: LightningModule, who: str) -> None:
    """Refuse manual optimization.

    Args:
        module: The module.
        who: What needs automatic optimization.

    Raises:
        MisconfigurationException: If the module optimizes manually.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{who} needs automatic optimization, but {type(module).__name__} sets `automatic_optimization = False`."
        )


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that shard parameters, reduce gradients in their own way, or do not run eagerly.

    Raises:
        MisconfigurationException: If the strategy is neither a single device nor DDP, or if it averages models
            instead of gradients.
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
    """The only optimizer of a fit.

    Raises:
        MisconfigurationException: If there are several optimizers, or if the step of the optimizer is not an ordinary
            one.
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
                f"A fused {type(optimizer).__name__} divides the gradients by the loss scale inside its step, but by"
                f" then they hold aggregated gradients without that scale; got precision={trainer.precision!r}. Pass"
                " `fused=False`, or use 'bf16-mixed'."
            )


def allow_repeated_backward() -> None:
    """Make ``torch.compile`` produce code whose backward can run several times.

    By default the backward of compiled code may overwrite tensors that its forward saved, so that it can run only
    once. ``torch.compile`` decides this when it compiles, by a setting of the whole process. If this call changes the
    setting, code that is already compiled is compiled again.
    """
    if getattr(functorch_config, "donated_buffer", False):
        functorch_config.donated_buffer = False
        torch._dynamo.reset()
