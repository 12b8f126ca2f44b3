"""What multi-task methods need beside being called: at the start of a fit, at epochs, and after optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torchjd.aggregation import MoDoWeighting, SDMGradWeighting
from torchjd.scalarization import DWA, FAMO

from lightning_cost.distributed import Ranks
from lightning_cost.memory import (
    forgetful,
    keep_apart,
    load_state,
    move_constants,
    state_of,
    untouched_by_backward,
)
from lightning_cost.replay import RecordedBatch, without_trace
from lightning_cost.support import check_optimizer, check_strategy

if TYPE_CHECKING:
    from lightning_cost.mixin import MultiTaskMixin

__all__: list[str] = []


class Upkeep:
    """Looks after the method of one module.

    DWA rolls its history on when an epoch has ended, FAMO learns its weights from the losses after each optimizer step,
    and what any method remembers goes into checkpoints.
    """

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._saved: dict[str, Any] | None = None
        self._step: tuple[list[RecordedBatch], Tensor] | None = None
        self._hook: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The hook belongs to one optimizer, and the batches to a step that no copy will finish.
        return {**self.__dict__, "_hook": None, "_step": None}

    def start(self, module: MultiTaskMixin) -> None:
        """Check the method and make it ready for a fit.

        Raises:
            MisconfigurationException: If it cannot be trained like this.
        """
        self.stop()
        method = _method(module)
        if method is None:
            self._epoch = self._saved = None
            return
        _check(method, module)
        keep_apart(method)
        move_constants(method, module.device)
        if self._saved is None:
            # A fit before this one ended without another epoch to notice it.
            if self._epoch is not None and isinstance(method, DWA):
                method.step()
            # A fit before this one may have run on another device.
            self._saved = {"epoch": None, "parts": state_of(method)}
        self._load(module, method)
        if isinstance(method, FAMO):
            check_strategy(module.trainer)
            self._hook = check_optimizer(module).register_step_post_hook(partial(self._after_step, module))

    def stop(self) -> None:
        """Leave the optimizer as it was."""
        self.discard_step()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def discard_step(self) -> None:
        """Forget an optimizer step that was not taken."""
        self._step = None

    def begin_batch(self, module: MultiTaskMixin) -> bool:
        """Notice a new epoch; returns whether the batch has to be recorded."""
        method = _method(module)
        if method is not None and self._saved is not None:
            # Some strategies load checkpoints after the fit started.
            self._load(module, method)
        if isinstance(method, DWA):
            epoch = module.trainer.current_epoch
            if self._epoch is not None and self._epoch != epoch:
                method.step()
            self._epoch = epoch
        return isinstance(method, FAMO)

    def before_step(self, module: MultiTaskMixin, window: Sequence[RecordedBatch], moved: bool) -> None:
        """Take down the losses from which an optimizer step is taken.

        Args:
            module: The module.
            window: The batches of the step.
            moved: Whether the parameters are no longer those that the batches were recorded with.
        """
        self.discard_step()
        if window and isinstance(_method(module), FAMO):
            losses = (
                _evaluate_again(module, window)
                if moved
                else Ranks.of(module).mean_(torch.stack([record.losses for record in window]).mean(dim=0))
            )
            self._step = list(window), losses

    def state_dict(self, module: MultiTaskMixin) -> dict[str, Any]:
        """What the method remembers, readable by ``torch.load(weights_only=True)``."""
        method = _method(module)
        if self._saved is not None:
            return self._saved
        return {} if method is None else {"epoch": self._epoch, "parts": state_of(method)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` when a fit starts, on its device."""
        self._saved = state or None

    def _load(self, module: MultiTaskMixin, method: nn.Module) -> None:
        saved, self._saved = self._saved, None
        assert saved is not None
        self._epoch = saved["epoch"]
        load_state(method, saved["parts"], module.device)

    def _after_step(self, module: MultiTaskMixin, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        method, step, self._step = _method(module), self._step, None
        if not isinstance(method, FAMO):
            return
        if step is None:
            if module.recorded_batches:
                raise MisconfigurationException(
                    f"{type(module).__name__}.on_before_optimizer_step did not call"
                    " `super().on_before_optimizer_step(optimizer)`, so FAMO cannot learn its weights."
                )
            return
        window, before = step
        after = _evaluate_again(module, window)
        if not bool(torch.isfinite(after).all()):
            # Its logits would never recover. The next training step says what is wrong, or the gradient scaler does.
            return
        lowest = method.min_losses.to(before)
        if bool((torch.minimum(before, after) < lowest).any()):
            raise ValueError(
                f"FAMO takes the logarithm of what each loss is above its `min_losses`, {lowest.tolist()} for the tasks"
                f" {list(module.task_names)}; the losses are {before.tolist()} before the optimizer step and"
                f" {after.tolist()} after it. Pass lower bounds of the losses as `min_losses`."
            )
        # Its last call may have been for one of several accumulated batches, or for where a teleport began.
        with torch.no_grad():
            method(before)
        method.update(after)


def ignored_by_ddp(module: MultiTaskMixin) -> list[str]:
    """Names of the parameters and buffers of a module that its method looks after without DDP."""
    method = _method(module)
    return [] if method is None else [f"mtl_method.{name}" for name in untouched_by_backward(method)]


def _method(module: MultiTaskMixin) -> nn.Module | None:
    method = getattr(module, "mtl_method", None)
    return method if isinstance(method, nn.Module) else None


def _evaluate_again(module: MultiTaskMixin, window: Sequence[RecordedBatch]) -> Tensor:
    """The task losses of some batches, with the random numbers that they had, averaged over them and the processes."""
    # With gradients, which a `task_losses` that differentiates something itself relies on.
    with torch.enable_grad(), without_trace(module):
        losses = [record.replay(module).values for record in window]
    return Ranks.of(module).mean_(torch.stack(losses).mean(dim=0))


def _check(method: nn.Module, module: MultiTaskMixin) -> None:
    for part in method.modules():
        if isinstance(part, (MoDoWeighting, SDMGradWeighting)):
            raise MisconfigurationException(
                f"{type(part).__name__} weighs the tasks by the products of their gradients on two independent batches;"
                " a training step has those of one. Use another method, such as torchjd.aggregation.MGDA."
            )
    updated = {
        parameter
        for optimizer in module.trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    untouched = untouched_by_backward(method)
    missing = [
        f"mtl_method.{name}"
        for name, parameter in method.named_parameters()
        if parameter.requires_grad and parameter not in updated and name not in untouched
    ]
    if missing:
        raise MisconfigurationException(
            f"{type(method).__name__} learns {', '.join(missing)}, which no optimizer has. Pass `self.parameters()` to"
            " the optimizer in `configure_optimizers`, not those of the network alone."
        )
    for name in forgetful(method):
        rank_zero_warn(
            f"What {name} remembers from step to step is unknown: of it, a checkpoint holds only the parameters and"
            " buffers, and a resumed run starts with the rest anew. Have its `get_extra_state` and `set_extra_state`"
            " (of torch.nn.Module) save it."
        )
