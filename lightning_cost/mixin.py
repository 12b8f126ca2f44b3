"""Gradient-based multi-task learning under Lightning's automatic optimization."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer
from typing_extensions import override

from lightning_cost._lightning.checks import check_package
from lightning_cost._training.engine import Engine
from lightning_cost._training.kept import Kept
from lightning_cost._training.shared import check_names, check_task_losses, missing_task_losses
from lightning_cost.gradients import TaskGradients

__all__ = ["MultiTaskMixin"]

_CHECKPOINT_KEY = "lightning_cost"


def check_is_multi_task(module: object, trainer: type, who: str) -> None:
    """Refuse, on behalf of a callback, modules that are not multi-task, and what is of ``pytorch_lightning``.

    Raises:
        MisconfigurationException: If the module does not subclass :class:`MultiTaskMixin`.
    """
    check_package(trainer, "Trainer")
    if not isinstance(module, MultiTaskMixin):
        raise MisconfigurationException(
            f"{who} needs a module that subclasses MultiTaskMixin; {type(module).__name__} does not. Write `class"
            " YourModule(MultiTaskMixin, LightningModule)` and its `task_losses`."
        )


class MultiTaskMixin(LightningModule):
    """Trains a LightningModule with several task losses and any TorchJD method.

    Subclass it before ``LightningModule``. Write :meth:`task_losses` instead of ``training_step``, and name the shared
    module. Everything else is Lightning's automatic optimization: one optimizer, any scheduler, clipping, accumulation,
    checkpoints.

    ``mtl_method`` decides what the shared parameters are updated with:

    - ``None``: the gradient of the mean of the losses (linear scalarization, LS). A task without a loss counts as zero.
    - a :class:`torchjd.scalarization.Scalarizer`: the gradient of its value.
    - a :class:`torchjd.aggregation.Aggregator`: its aggregation of the task gradients. All other parameters (the heads)
      get the gradient of the sum of the losses. Tasks without a gradient in a step are left out.

    Shared parameters that the optimizer does not train now (frozen, in no parameter group, or in one with a learning
    rate of 0) take no part. While none is trained, there are no task gradients.

    Methods that remember something from step to step (DWA, FAMO, Nash-MTL, ...) keep it in checkpoints, and in step on
    several processes. Methods that learn parameters (UW, IMTL-L) need them in the optimizer: pass it
    ``self.parameters()``.

    The mixin logs the task losses as ``train/<task>_loss`` and their scalarization as ``train/loss``.

    If you override ``on_fit_start``, ``training_step``, ``backward``, ``on_before_optimizer_step``, ``teardown`` or a
    checkpoint hook, call ``super()`` in it. To regularize, add the term to a task loss: a term that you add to the
    returned loss belongs to no task.

    Attributes:
        shared_module: Name of the attribute that holds the shared module, or a sequence of names. Dotted paths reach
            into submodules. All their parameters that the optimizer trains are shared.
        mtl_method: The multi-task method. Set it in ``__init__`` after ``super().__init__()``.
        task_gradients_of: What an aggregator combines the gradients of. ``"parameters"``: the shared parameters, at a
            backward pass for each task. ``"features"``: the outputs of the shared module, at a backward pass through
            the heads for each task. One pass then takes the result through the backbone. This is an approximation
            (Sener and Koltun, 2018), and a step costs little more than a plain one. Triggers and teleports still look
            at the gradients of the parameters.
        weights_every: For how many optimizer steps an aggregator's task weights hold. The steps that reuse them cost
            little more than a plain one. A step in which they are computed is exact.
        reduce_dtype: Type in which DDP sends the task gradients, such as ``torch.bfloat16``; ``None`` for their own.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchjd.aggregation import UPGrad
        >>> class LitModel(MultiTaskMixin, LightningModule):
        ...     shared_module = "backbone"
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mtl_method = UPGrad()
        ...         self.backbone = nn.Linear(4, 8)
        ...         self.heads = nn.ModuleDict({"left": nn.Linear(8, 1), "right": nn.Linear(8, 1)})
        ...
        ...     def task_losses(self, batch, batch_idx):
        ...         features = self.backbone(batch["x"]).relu()
        ...         return {name: (head(features) - batch[name]).pow(2).mean() for name, head in self.heads.items()}
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters(), lr=1e-3)
    """

    shared_module: str | Sequence[str] = "backbone"
    task_gradients_of: Literal["parameters", "features"] = "parameters"
    weights_every: int = 1
    # Annotated only: a class attribute would hide the submodule that `self.mtl_method = ...` registers.
    mtl_method: Aggregator | Scalarizer | None
    reduce_dtype: torch.dtype | None = None
    _multi_task: Kept

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse modules of the package ``pytorch_lightning``."""
        super().__init_subclass__(**kwargs)
        check_package(cls, "LightningModule")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # First, and not as a module would: a later base class may set `_ddp_params_and_buffers_to_ignore`.
        object.__setattr__(self, "_multi_task", Kept())
        super().__init__(*args, **kwargs)

    def task_losses(self, batch: Any, batch_idx: int) -> Mapping[str, Tensor]:
        """Compute the loss of every task on a batch. This is what you write, here or in a later base class.

        It runs once per training batch. While a teleport searches, and for FAMO, it runs again on the same batch. It
        must be *repeatable*: with the same parameters it returns the same losses.

        Each further call starts from what the first one saw: the batch with its containers (you may ``pop`` from
        them), the global random numbers, and the buffers, frozen parameters and attributes of all modules. Of
        attributes, this holds for what they refer to, and for the content of tensors, arrays, lists, dictionaries, sets
        and random generators.
        Afterwards all of it is as if there had been no further call, and ``self.log`` does nothing meanwhile. Anything
        else is yours: do not let the losses depend on it, and guard side effects on it by ``if not self.replaying``. If
        the losses do not come back, an error says so.

        Args:
            batch: The batch.
            batch_idx: Its index in the epoch.

        Returns:
            Scalar losses by task name. For a task without labels in this batch, return ``None``. To weigh the tasks,
            weigh their losses.
        """
        inherited = getattr(super(), "task_losses", None)
        if inherited is None:
            raise NotImplementedError(missing_task_losses(self))
        return inherited(batch, batch_idx)  # type: ignore[no-any-return]

    @property
    def task_gradients(self) -> TaskGradients | None:
        """The task gradients of the current optimizer step.

        They are available after ``backward`` (in ``on_after_backward``, ``on_before_optimizer_step`` and later) if this
        step needs them: for an aggregator, for a trigger check that is due, or after :meth:`request_task_gradients`.
        Otherwise they are ``None``, and the step costs what plain Lightning costs.

        They are averaged over the processes of DDP, and do not have the scale of a gradient scaler. With a scaler they
        may be infinite or NaN (see ``is_finite``): it then skips the step. Between micro-batches they are the sum so
        far, of this process alone.
        """
        return Engine(self).gradients

    def request_task_gradients(self) -> None:
        """Compute the task gradients in the coming optimizer step.

        Call it on every process and before ``training_step``, for example in ``on_train_batch_start`` of a callback.
        """
        Engine(self).request()

    @property
    def replaying(self) -> bool:
        """Whether :meth:`task_losses` is being evaluated again. Leave out side effects of your own then."""
        return self._multi_task.replaying

    @override
    def on_fit_start(self) -> None:
        """Refuse what is not supported before the first batch."""
        super().on_fit_start()
        if not isinstance(self._multi_task, Kept):
            raise MisconfigurationException(
                f"{type(self).__name__} sets `_multi_task`, a name that MultiTaskMixin uses; got {self._multi_task!r}."
                " Give it another name."
            )
        check_names(
            self,
            ("task_losses", "task_gradients", "request_task_gradients", "replaying", "reduce_dtype", "weights_every"),
        )
        check_task_losses(self, MultiTaskMixin)
        Engine(self).start_fit()

    @override
    def teardown(self, stage: str) -> None:
        """Leave the optimizer as it was."""
        super().teardown(stage)
        Engine(self).end_fit()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Compute, check and log the task losses. See :meth:`task_losses`.

        Returns:
            Their scalarization; ``None``, with which Lightning skips the batch, if no task has a loss.
        """
        losses, total = Engine(self).training_step(batch, batch_idx)
        if self._trainer is not None and total is not None:
            self.log_dict({f"train/{name}_loss": loss.detach() for name, loss in losses.items()})
            self.log("train/loss", total.detach())
        return total

    @override
    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does, but not while :meth:`task_losses` is being evaluated again."""
        if not self.replaying:
            super().log(*args, **kwargs)

    @override
    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does, but not while :meth:`task_losses` is being evaluated again."""
        if not self.replaying:
            super().log_dict(*args, **kwargs)

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the ordinary backward pass, and compute and aggregate the task gradients if the step needs them."""
        ordinary = super().backward
        Engine(self).backward(loss, lambda **options: ordinary(loss, *args, **{**kwargs, **options}))

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Learn from the step, which is over now."""
        Engine(self).before_optimizer_step()
        super().on_before_optimizer_step(optimizer)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the method remembers, and which row is subtracted next, so that a resumed run rounds the same."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_CHECKPOINT_KEY] = Engine(self).state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what :meth:`on_save_checkpoint` saved, if it is there."""
        super().on_load_checkpoint(checkpoint)
        Engine(self).load_state_dict(checkpoint.get(_CHECKPOINT_KEY, {}))

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """DDP reads it. DDP would wait forever for gradients of what a method changes without a backward pass."""
        return [*self._multi_task.ignored_by_ddp, *Engine(self).changed_by_method()]

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Iterable[str]) -> None:
        self._multi_task.ignored_by_ddp = tuple(names)
