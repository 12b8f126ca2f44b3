"""What a module does in each of Lightning's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_cost._lightning.checks import (
    allow_repeated_backward,
    check_automatic_optimization,
    check_optimizer,
    check_strategy,
    check_unscaling,
    gradient_scaler,
    loss_scale_of,
)
from lightning_cost._lightning.ranks import Ranks
from lightning_cost._lightning.recording import RecordedBatch, preserved
from lightning_cost._lightning.rng import RngState
from lightning_cost._training.accumulator import Accumulator
from lightning_cost._training.evaluate import (
    Numerics,
    Scalarization,
    check_finite,
    check_losses,
    mean_losses,
    values_of,
)
from lightning_cost._training.kept import Kept
from lightning_cost._training.method import Method, check_method, make_method, write_gradient
from lightning_cost._training.method_state import MethodSnapshot, changed_without_backward
from lightning_cost._training.shared import shared_parameters
from lightning_cost._training.step import PendingLosses, Step, Window
from lightning_cost.gradients import TaskGradients

__all__: list[str] = []


class Engine:
    """Trains one module. :class:`~lightning_cost.mixin.MultiTaskMixin` makes one wherever Lightning calls a hook.

    Args:
        module: The module, which holds what is kept from hook to hook.
    """

    def __init__(self, module: LightningModule) -> None:
        kept: Any = module._multi_task
        self._module: Any = module
        self._kept: Kept = kept

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in the order of the first step; empty before it."""
        return self._kept.names

    @property
    def method(self) -> Method:
        """How the module's ``mtl_method`` is used."""
        wrapped = getattr(self._module, "mtl_method", None)
        if self._kept.method.wrapped is not wrapped:
            self._kept.method = make_method(wrapped)
        return self._kept.method

    @property
    def numerics(self) -> Numerics:
        """What the Trainer does to losses and gradients in this step."""
        return Numerics(Ranks.of(self._module), loss_scale_of(self._module.trainer), self._module.reduce_dtype)

    @property
    def window(self) -> Window:
        """The optimizer step that the current training batch belongs to."""
        trainer = self._module.trainer
        return trainer.current_epoch, trainer.fit_loop.batch_idx // trainer.accumulate_grad_batches

    @property
    def step(self) -> Step | None:
        """The optimizer step under way; ``None`` outside of one."""
        return self._kept.step

    @property
    def gradients(self) -> TaskGradients | None:
        """The task gradients of the step under way, or else of the last one; ``None`` if it did not need them."""
        return self._kept.gradients if self._kept.step is None else self._kept.step.gradients

    def request(self, batches: bool = False) -> None:
        """Compute task gradients in the optimizer step that the current or the next training batch belongs to.

        Args:
            batches: Whether to record its batches as well.
        """
        allow_repeated_backward()
        step = self._kept.step
        if step is None or self._trainer is None or step.window != self.window:
            step = self._kept.coming
        step.wants_gradients = True
        step.wants_batches |= batches

    def start_fit(self) -> None:
        """Check what can be checked before the first batch, and make the method ready.

        Raises:
            MisconfigurationException: If something is not supported.
        """
        module, method = self._module, self.method
        # An earlier fit may have ended in the middle of a step.
        self._kept.step, self._kept.coming, self._kept.gradients = None, Step(), None
        if module.reduce_dtype is not None and not getattr(module.reduce_dtype, "is_floating_point", False):
            raise MisconfigurationException(
                f"`reduce_dtype` of {type(module).__name__} must be a floating torch.dtype such as torch.bfloat16, or"
                f" None; got {module.reduce_dtype!r}."
            )
        check_automatic_optimization(module, "MultiTaskMixin")
        if method.aggregates:
            check_strategy(module.trainer)
            check_unscaling(module.trainer)
            shared_parameters(module)
            allow_repeated_backward()
        self._remove_hook()
        wrapped = method.wrapped
        if wrapped is not None:
            check_method(wrapped, module)
        self._kept.method_state.start(wrapped, module.device, method.end_epoch)
        if method.compares_losses:
            check_strategy(module.trainer)
            self._kept.hook = check_optimizer(module).register_step_post_hook(self._after_optimizer_step)

    def end_fit(self) -> None:
        """Leave the optimizer as it was, and hold no batches."""
        self._kept.gradients = self.gradients
        self._kept.step, self._kept.coming, self._kept.comparison = None, Step(), None
        self._remove_hook()

    def training_step(self, batch: Any, batch_idx: int) -> tuple[dict[str, Tensor], Tensor]:
        """Evaluate and scalarize the task losses of a batch.

        Returns:
            The losses by task, and their scalarization.
        """
        trainer = self._trainer
        # A validation step may call `training_step`, in the middle of a window of micro-batches.
        training = trainer is not None and trainer.training
        step = self._begin_batch() if training else None
        rng = RngState.capture() if step is not None and step.wants_batches else None
        losses = self.evaluate(batch, batch_idx)
        validating = trainer is not None and not training
        # A gradient scaler expects losses that overflow, and skips the step. The method must not remember them.
        scaled = trainer is not None and gradient_scaler(trainer) is not None
        before = MethodSnapshot(self.method.wrapped) if validating or scaled else None
        scalarization = self._scalarize(losses, Ranks.of(self._module) if training else Ranks())
        if before is not None and (validating or not bool(torch.isfinite(scalarization.total))):
            before.restore()
        if not scaled and not bool(torch.isfinite(values_of(losses)).all()):
            check_finite({name: float(loss.detach()) for name, loss in losses.items()}, "The loss")
        if step is not None:
            record = None if rng is None else RecordedBatch(batch, batch_idx, rng, values_of(losses))
            step.pending = PendingLosses(losses, scalarization, record)
        return losses, scalarization.total

    def backward(self, loss: Tensor, backward: Callable[[], None]) -> None:
        """Run the ordinary backward pass of a micro-batch, and differentiate the tasks if anybody needs it.

        Args:
            loss: What Lightning differentiates.
            backward: Runs the ordinary backward pass.
        """
        step = self._kept.step
        pending = None if step is None else step.pending
        if step is not None:
            step.pending = None
        wanted = self._kept.coming.wants_gradients if step is None else step.wants_gradients
        if not (wanted or self.method.aggregates):
            backward()
        elif step is None or pending is None:
            raise MisconfigurationException(
                f"{type(self._module).__name__}.training_step did not call `super().training_step(batch, batch_idx)`,"
                " so its task losses are unknown. Write `task_losses` instead of `training_step`, or call super."
            )
        else:
            self._differentiate(step, loss, pending, backward)
        # Not earlier: a batch for which `training_step` returns None never gets here.
        if step is not None and pending is not None and pending.batch is not None:
            step.batches.append(pending.batch)

    def before_optimizer_step(self) -> None:
        """Aggregate the task gradients into ``.grad`` of the shared parameters. The step is over."""
        step, method, ranks = self._kept.step, self.method, Ranks.of(self._module)
        if step is None:
            return
        gradients = step.gradients
        # Only a gradient scaler lets gradients pass that are not finite. It is going to skip the step.
        if gradients is not None and step.accumulator is not None and gradients.is_finite:
            losses = step.accumulator.losses if step.moved is None else step.moved[1].tolist()
            self._kept.expected.learn(gradients, losses)
            if method.aggregates:
                shared = step.accumulator.shared
                write_gradient(method.aggregate(gradients, shared, ranks), shared)
        if method.compares_losses and step.batches:
            moved = step.moved is not None
            self._kept.comparison = step.batches, self._evaluate_again(step.batches) if moved else step.losses(ranks)
        if gradients is not None:
            self._kept.matrix = gradients.matrix
        self._kept.gradients, self._kept.step = gradients, None

    def move_to(self, gradients: TaskGradients, losses: Tensor) -> Tensor:
        """Go on with this optimizer step from the point that a teleport moved to.

        Args:
            gradients: The task gradients there. ``.grad`` of every parameter belongs to this point as well.
            losses: The task losses there, shape ``(K,)``.

        Returns:
            A matrix whose memory is free: that of the task gradients before.
        """
        step = self._kept.step
        assert step is not None
        left = step.gradients
        assert left is not None
        step.moved = gradients, losses
        return left.matrix

    def evaluate(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Evaluate and check ``task_losses``."""
        losses = check_losses(self._module.task_losses(batch, batch_idx), self.names or None)
        if self.names:
            return losses
        self._kept.names = self._common_names(tuple(losses))
        return {name: losses[name] for name in self.names}

    def replay(self, record: RecordedBatch) -> dict[str, Tensor]:
        """Evaluate ``task_losses`` on a recorded batch again, with the random numbers and the precision of its step."""
        record.rng.restore()
        with self._module.trainer.precision_plugin.train_step_context():
            return self.evaluate(record.batch, record.batch_idx)

    def scalarize_again(self, losses: dict[str, Tensor]) -> Scalarization:
        """Scalarize losses of :meth:`replay` as :meth:`training_step` does."""
        with self._module.trainer.precision_plugin.train_step_context():
            return self._scalarize(losses, Ranks.of(self._module))

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Restore on exit what evaluations change, the method's memory included. Gradients and parameters are kept."""
        method = MethodSnapshot(self.method.wrapped)
        self._kept.replaying = True
        try:
            with preserved(self._module):
                try:
                    yield
                finally:
                    method.restore()
        finally:
            self._kept.replaying = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs for a resumed run to do, and to round, what an uninterrupted one does."""
        return {
            "rates": dict(self._kept.expected.rates),
            "method": self._kept.method_state.state_dict(self.method.wrapped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load :meth:`state_dict`."""
        self._kept.expected.rates = dict(state.get("rates", {}))
        self._kept.method_state.load_state_dict(state.get("method", {}))

    def changed_by_method(self) -> list[str]:
        """Names of the parameters and buffers that DDP must leave to the method. It would wait for their gradients."""
        wrapped = self.method.wrapped
        return [] if wrapped is None else [f"mtl_method.{name}" for name in changed_without_backward(wrapped)]

    @property
    def _trainer(self) -> Trainer | None:
        trainer: Trainer | None = self._module._trainer
        return trainer

    def _begin_batch(self) -> Step:
        trainer, method, window = self._module.trainer, self.method, self.window
        step = self._kept.step
        # A hook may end an epoch in the middle of a window of micro-batches. No optimizer step follows.
        if step is None or step.window != window:
            if step is not None and step.global_step is not None and trainer.global_step > step.global_step:
                raise MisconfigurationException(
                    f"{type(self._module).__name__}.on_before_optimizer_step did not call"
                    " `super().on_before_optimizer_step(optimizer)`, so the task gradients were never aggregated."
                )
            step = self._kept.step = self._kept.coming
            self._kept.coming, step.window = Step(), window
        self._kept.method_state.load_pending(method.wrapped, self._module.device)
        self._kept.method_state.enter_epoch(trainer.current_epoch, method.end_epoch)
        step.wants_batches |= method.compares_losses
        return step

    def _scalarize(self, losses: dict[str, Tensor], ranks: Ranks) -> Scalarization:
        return self.method.scalarize(torch.stack(list(losses.values())), ranks)

    def _differentiate(self, step: Step, loss: Tensor, pending: PendingLosses, backward: Callable[[], None]) -> None:
        module, trainer = self._module, self._module.trainer
        check_strategy(trainer)
        check_unscaling(trainer)
        numerics = self.numerics
        self._check_returned_loss(loss, pending.scalarization.total, numerics.loss_scale)
        if step.accumulator is None:
            step.accumulator = Accumulator(shared_parameters(module), self._kept.expected, numerics, self._kept.matrix)
        # A communication hook may compress `.grad` on its way. Then the other rows do not sum up to it.
        exact = not getattr(trainer.strategy.model, "_comm_hooks", ())
        step.accumulator.add(
            pending.by_task,
            pending.scalarization.weight if exact else None,
            1 / trainer.accumulate_grad_batches,
            backward,
            numerics.ranks.mean_(values_of(pending.by_task)),
        )
        step.global_step = trainer.global_step
        ready = trainer.fit_loop.batch_idx + 1
        is_last = trainer.is_last_batch or ready == trainer.num_training_batches
        if is_last or ready % trainer.accumulate_grad_batches == 0:
            self._complete(step.accumulator)

    def _check_returned_loss(self, loss: Tensor, total: Tensor, loss_scale: float) -> None:
        micro_batches = self._module.trainer.accumulate_grad_batches
        returned, expected = loss.detach(), total.detach() / micro_batches * loss_scale
        if not torch.equal(returned, expected) and bool(torch.isfinite(expected)):
            raise MisconfigurationException(
                f"{type(self._module).__name__}.training_step returned a loss other than the one of MultiTaskMixin"
                f" ({float(returned) * micro_batches / loss_scale:g} instead of {float(total.detach()):g}). What it"
                " adds belongs to no task, so no multi-task method can weigh it: add it to the losses that"
                " `task_losses` returns."
            )

    def _complete(self, accumulator: Accumulator) -> None:
        gradients = accumulator.complete()
        if gradient_scaler(self._module.trainer) is not None:
            # The scaler looks at `.grad` only. If a row is not finite, this makes the scaler skip the step.
            trace = gradients.gramian.sum() * 0
            for parameter in accumulator.shared:
                if parameter.grad is not None and not parameter.grad.is_sparse:
                    parameter.grad.add_(trace)
                    break
        elif not gradients.is_finite:
            check_finite(dict(zip(gradients.names, gradients.norms.tolist(), strict=True)), "The gradient")

    def _after_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        method, comparison = self.method, self._kept.comparison
        self._kept.comparison = None
        if not method.compares_losses:
            return
        if self._kept.step is not None and self._kept.step.batches:
            raise MisconfigurationException(
                f"{type(self._module).__name__}.on_before_optimizer_step did not call"
                f" `super().on_before_optimizer_step(optimizer)`, so {type(method.wrapped).__name__} cannot learn its"
                " weights."
            )
        if comparison is not None:
            batches, before = comparison
            method.update(before, self._evaluate_again(batches), self.names)

    def _evaluate_again(self, batches: Sequence[RecordedBatch]) -> Tensor:
        # With gradients: a `task_losses` that differentiates something itself relies on them.
        with torch.enable_grad(), self.without_trace():
            losses = [values_of(self.replay(batch)) for batch in batches]
        return mean_losses(losses, Ranks.of(self._module))

    def _common_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names in the order of rank 0. Rows are averaged by their position."""
        everywhere = [names] if self._trainer is None else Ranks.of(self._module).gather(names)
        if any(set(others) != set(names) for others in everywhere):
            raise ValueError(f"`task_losses` must return the same tasks on every process; got {everywhere}.")
        common: tuple[str, ...] = everywhere[0]
        return common

    def _remove_hook(self) -> None:
        if self._kept.hook is not None:
            self._kept.hook.remove()
            self._kept.hook = None
