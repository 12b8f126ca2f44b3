"""What a module does in each of Lightning's hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_cost._lightning.checks import (
    allow_repeated_backward,
    check_automatic_optimization,
    check_optimizer,
    check_strategy,
    check_unscaling,
    gradient_scaler,
)
from lightning_cost._lightning.ranks import Ranks
from lightning_cost._training.differentiator import Differentiator
from lightning_cost._training.evaluate import check_has_graph
from lightning_cost._training.late import LateCheck, waits_for
from lightning_cost._training.method_checks import (
    check_assigned,
    check_method,
    named_errors,
)
from lightning_cost._training.method_state import changed_without_backward, snapshot
from lightning_cost._training.options import check_options
from lightning_cost._training.reused import TaskWeights
from lightning_cost._training.shared import check_parameters, name_of
from lightning_cost._training.step import PendingLosses, Step, Window
from lightning_cost.gradients import TaskGradients

__all__: list[str] = []


class Engine(Differentiator):
    """Trains one module. :class:`~lightning_cost.mixin.MultiTaskMixin` makes one wherever Lightning calls a hook.

    Args:
        module: The module, which holds what is kept from hook to hook.
    """

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

    @property
    def watched(self) -> TaskGradients | None:
        """The task gradients of a step under way that was asked to :meth:`watch`; ``None`` if there are none."""
        step = self._kept.step
        if step is None:
            return None
        gradients = step.gradients
        return step.watched.gradients if gradients is None and step.watched is not None else gradients

    def watch(self) -> None:
        """Measure task gradients in the step that :meth:`request` is about, without any effect on it."""
        allow_repeated_backward()
        self._requested.watches = True

    def request(self, batches: bool = False, lazily: bool = False) -> None:
        """Compute task gradients in the optimizer step that the current or the next training batch belongs to.

        Args:
            batches: Whether to record its batches as well.
            lazily: Whether the task with the smallest gradient and the mean are enough. See :meth:`conflicts`.
        """
        allow_repeated_backward()
        step = self._requested
        step.wants_gradients |= not lazily
        step.wants_pair |= lazily
        step.wants_batches |= batches

    @property
    def _requested(self) -> Step:
        """The step that the current or the next training batch belongs to."""
        step = self._kept.step
        return self._kept.coming if step is None or self._trainer is None or step.window != self.window else step

    def start_fit(self) -> None:
        """Check what can be checked before the first batch, and make the method ready.

        Raises:
            MisconfigurationException: If something is not supported.
        """
        module = self._module
        # An earlier fit may have ended in the middle of a step.
        self._kept.step, self._kept.coming, self._kept.gradients = None, Step(), None
        self._kept.comparison, self._kept.comparisons, self._kept.late = None, 0, None
        self._kept.clones_batches, self._kept.written, self._kept.checked_features = False, None, False
        check_assigned(module)
        check_options(module)
        check_automatic_optimization(module, "MultiTaskMixin")
        self._prepare_method()

    def end_fit(self) -> None:
        """Leave the optimizer as it was, and hold no batches."""
        if self._kept.step is not None:
            # The rows of a window that was not finished are lost. The module may be on another device by now.
            accumulator = self._kept.step.accumulator
            self._kept.gradients = None if accumulator is None else accumulator.gradients
        self._kept.step, self._kept.coming, self._kept.comparison = None, Step(), None
        self._remove_hook()
        if self._trainer is None or self._trainer.interrupted:
            # An error of its own ends the fit.
            self._kept.late = None
        self.look_at_losses()

    def training_step(self, batch: Any, batch_idx: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Evaluate and scalarize the task losses of a batch.

        Returns:
            The losses by task, without those that are missing, and their scalarization; ``None`` if all are missing.
        """
        self.look_at_losses()
        trainer = self._trainer
        # A validation step may call `training_step`, in the middle of a window of micro-batches.
        training = trainer is not None and trainer.training
        step = self._begin_batch() if training else None
        scene = self.scene(batch, batch_idx) if step is not None and step.wants_batches else None
        losses = self.evaluate(batch, batch_idx)
        ranks = Ranks.of(self._module) if training else Ranks()
        if training and torch.is_grad_enabled():
            check_has_graph(losses, self._module)
        validating = trainer is not None and not training
        # A gradient scaler expects losses that overflow, and skips the step. The method must not remember them.
        scaled = trainer is not None and gradient_scaler(trainer) is not None
        if losses and not scaled:
            self._kept.late = LateCheck(losses, self._global_step)
            if not training or self.method.remembers_losses or not waits_for(losses):
                self.look_at_losses()
        if not losses and ranks.size == 1:
            return losses, None
        before = snapshot(self.method.wrapped) if validating or scaled else None
        scalarization = self.scalarize(losses, ranks)
        if before is not None and (validating or not bool(torch.isfinite(scalarization.total))):
            before.restore()
        if training and ranks.size > 1 and len(losses) < len(self.names):
            # DDP waits for a gradient of every parameter, also of the head of a task without labels here.
            scalarization = scalarization._replace(total=scalarization.total + self.nothing())
        if step is not None:
            record = None if scene is None else self.record(scene, losses)
            step.pending = PendingLosses(losses, scalarization, record)
        return losses, scalarization.total

    def backward(self, loss: Tensor, backward: Callable[..., None]) -> None:
        """Run the ordinary backward pass of a micro-batch, and differentiate the tasks if anybody needs it.

        Args:
            loss: What Lightning differentiates.
            backward: Runs the ordinary backward pass, with further options.
        """
        step = self._kept.step
        pending = None if step is None else step.pending
        if step is not None:
            step.pending = None
        asked = self._kept.coming if step is None else step
        all_rows = asked.wants_gradients or self._aggregates(step)
        needed, watches = all_rows or (step is not None and step.wants_pair), asked.watches and not all_rows
        if not (needed or watches):
            backward()
        elif step is None or pending is None:
            raise MisconfigurationException(
                f"{type(self._module).__name__}.training_step did not call `super().training_step(batch, batch_idx)`,"
                " so its task losses are unknown. Write `task_losses` instead of `training_step`, or call super."
            )
        else:
            if watches:
                self._watch(step, pending)
            if needed:
                self._differentiate(step, loss, pending, backward)
            else:
                backward()
        # Not earlier: a batch for which `training_step` returns None never gets here.
        if step is not None and pending is not None and pending.batch is not None:
            step.batches.append(pending.batch)
        if step is not None and step.wants_gradients and step.pair is not None and step.pair.accumulator.gradients:
            # Somebody asked for all rows when the first micro-batch was over.
            self.expand()

    def before_optimizer_step(self) -> None:
        """Learn from the step, which is over now."""
        step, method, ranks = self._kept.step, self.method, Ranks.of(self._module)
        if step is None:
            return
        gradients = step.gradients
        # Only a gradient scaler lets gradients pass that are not finite. It is going to skip the step.
        if gradients is not None and step.accumulator is not None and gradients.is_finite:
            self._kept.expected.learn(gradients, step.accumulator.losses if step.moved is None else step.moved[1])
            self._aggregate(step, gradients)
        self._note_weights(step)
        if method.compares_losses and step.batches:
            moved = step.has_moved
            before = self.evaluate_again(step.batches) if moved else step.losses(self.names, ranks)
            self._kept.comparison = (step.batches, before) if self.comparable(step, before, moved) else None
        if gradients is not None:
            self._kept.matrix = gradients.matrix
        if step.pair is not None and step.pair.accumulator.gradients is not None:
            self._kept.pair_matrix = step.pair.accumulator.gradients.matrix
            if gradients is None and step.pair.accumulator.gradients.is_finite:
                for name, rate in step.pair.rate().items():
                    self._kept.expected.note(name, rate)
        self._kept.gradients, self._kept.step = gradients, None

    def move_to(self, gradients: TaskGradients | None, losses: Tensor) -> Tensor | None:
        """Go on with this optimizer step from the point that a teleport moved to.

        Args:
            gradients: The task gradients there. ``.grad`` of every parameter belongs to this point as well. ``None`` if
                the step takes the gradients of the point that was left.
            losses: The task losses there, shape ``(K,)``.

        Returns:
            A matrix whose memory is free: that of the task gradients before, if there are new ones.
        """
        step = self._kept.step
        assert step is not None
        step.has_moved = True
        if gradients is None:
            return None
        left = step.gradients
        assert left is not None
        if step.method_before is not None:
            # The method has aggregated the gradients of the point that was left.
            step.method_before.restore()
        step.aggregated = False
        self._aggregate(step, gradients)
        step.moved = gradients, dict(zip(gradients.names, losses.tolist(), strict=True))
        return left.matrix

    def undo_of_move(self) -> Callable[[], None]:
        """A function that undoes :meth:`move_to`, apart from ``.grad``, also if it has failed half-way."""
        step, memory = self._kept.step, snapshot(self.method.wrapped)
        assert step is not None
        aggregated = step.aggregated

        def undo() -> None:
            memory.restore()
            step.aggregated, step.moved, step.has_moved = aggregated, None, False

        return undo

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs for a resumed run to do, and to round, what an uninterrupted one does."""
        self.look_at_losses()
        return {
            "names": list(self._kept.names),
            "rates": dict(self._kept.expected.rates),
            "mean_rates": dict(self._kept.expected.means),
            "weights": self._kept.task_weights.state_dict(),
            "method": self._kept.method_state.state_dict(self.method.wrapped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load :meth:`state_dict`."""
        if self._trainer is not None:
            # Not where somebody loads the weights into another module, which may have other tasks.
            self._kept.names = tuple(state.get("names", ()))
        self._kept.expected.rates = dict(state.get("rates", {}))
        self._kept.expected.means = dict(state.get("mean_rates", {}))
        self._kept.task_weights.load_state_dict(state.get("weights", {}))
        self._kept.method_state.load_state_dict(state.get("method", {}))

    def changed_by_method(self) -> list[str]:
        """Names of the parameters and buffers that DDP must leave to the method. It would wait for their gradients."""
        wrapped = self.method.wrapped
        return [] if wrapped is None else [f"mtl_method.{name}" for name in changed_without_backward(wrapped)]

    def _prepare_method(self) -> None:
        """Check the method and make it ready, when a fit starts and when somebody has set another one."""
        module, method = self._module, self.method
        self._kept.prepared = method
        if method.aggregates or method.takes_features:
            check_strategy(module.trainer)
            check_unscaling(module.trainer)
            check_parameters(module)
            allow_repeated_backward()
        self._remove_hook()
        wrapped = method.wrapped
        if wrapped is not None:
            check_method(wrapped, module)
        self._kept.method_state.start(wrapped, module.device, method.end_epoch)
        if method.compares_losses:
            check_strategy(module.trainer)
            self._kept.hook = check_optimizer(module).register_step_post_hook(self._after_optimizer_step)

    def _begin_batch(self) -> Step:
        trainer, method, window, step = self._module.trainer, self.method, self.window, self._kept.step
        if self._kept.prepared is not method:
            check_options(self._module)
            self._kept.task_weights = TaskWeights()
            self._prepare_method()
        # A hook may end an epoch in the middle of a window of micro-batches. No optimizer step follows.
        if step is None or step.window != window:
            if step is not None and step.global_step is not None and trainer.global_step > step.global_step:
                raise MisconfigurationException(
                    f"{type(self._module).__name__}.on_before_optimizer_step did not call"
                    " `super().on_before_optimizer_step(optimizer)`, so the step of the task gradients never ended."
                )
            step = self._kept.step = self._kept.coming
            self._kept.coming, step.window = Step(), window
            step.weights = self._kept.task_weights.for_step(self.names, self._module.weights_every)
        self._kept.method_state.load_pending(method.wrapped, self._module.device)
        self._kept.method_state.enter_epoch(trainer.current_epoch, method.end_epoch)
        step.wants_batches |= method.compares_losses
        return step

    def edited_parameter(self, by_norm: bool) -> str | None:
        """The name of a parameter whose ``.grad`` somebody has edited since backward; ``None`` if there is none.

        Call it when a gradient scaler has unscaled ``.grad``.

        Args:
            by_norm: Whether to notice also what was written through ``.data``.
        """
        step = self._kept.step
        if step is None or step.mark is None:
            return None
        edited = step.mark.edited(1 / self.numerics.loss_scale, by_norm)
        return None if edited is None else name_of(self._module, edited)

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
            there = self.numerics.ranks.any_of([any(name in b.losses for b in batches) for name in self.names])
            after = self.evaluate_again(batches)
            with named_errors(method.wrapped, self._module.trainer.global_step - 1):
                method.update(before, after, self.names, there)

    def _remove_hook(self) -> None:
        if self._kept.hook is not None:
            self._kept.hook.remove()
            self._kept.hook = None
