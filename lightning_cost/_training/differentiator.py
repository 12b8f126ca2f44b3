"""Differentiating the tasks of an optimizer step, and aggregating their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_cost._lightning.checks import check_strategy, check_unscaling, gradient_scaler
from lightning_cost._lightning.ranks import Ranks
from lightning_cost._lightning.rng import preserved_rng
from lightning_cost._lightning.state import unchanged_buffers
from lightning_cost._training.accumulator import Accumulator, ExpectedNorms
from lightning_cost._training.evaluate import check_finite
from lightning_cost._training.evaluator import Evaluator
from lightning_cost._training.grads import GradMark
from lightning_cost._training.method import AggregatorMethod, write_gradient
from lightning_cost._training.method_checks import has_changed, named_errors, refuse_changed_loss, warn_of_hooks
from lightning_cost._training.method_state import snapshot
from lightning_cost._training.pair import TaskPair
from lightning_cost._training.shared import name_of, trained_parameters
from lightning_cost._training.step import PendingLosses, Step
from lightning_cost.gradients import TaskGradients

__all__: list[str] = []


class Differentiator(Evaluator):
    """Differentiates the task losses of one module, and aggregates their gradients if its method does."""

    def _differentiate(self, step: Step, loss: Tensor, pending: PendingLosses, backward: Callable[..., None]) -> None:
        module, trainer = self._module, self._module.trainer
        check_strategy(trainer)
        check_unscaling(trainer)
        numerics = self.numerics
        losses, collected = pending.by_task, step.collected
        shared, whole = trained_parameters(module) if collected is None else (collected.shared, True)
        if not shared:
            # All that the tasks share is frozen for now.
            backward()
            return
        total, share = pending.scalarization.total, 1 / trainer.accumulate_grad_batches
        changed = has_changed(loss, total, trainer.accumulate_grad_batches, numerics.loss_scale)
        values, edited, is_changed = self.across_ranks(losses, collected is not None and collected.edited, changed)
        self.look_at_losses()
        if is_changed:
            refuse_changed_loss(module, loss, total, share * numerics.loss_scale)
        begins = collected is None
        if collected is None:
            collected = self._collect(step, shared, whole, values)
        elif edited:
            collected.stop_subtracting()
        # A communication hook may compress `.grad` on its way. Then the other rows do not sum up to it.
        hooked = next((p for p in shared if getattr(p, "_post_accumulate_grad_hooks", None)), None)
        if hooked is not None and not self._kept.warned_of_hooks:
            self._kept.warned_of_hooks = True
            warn_of_hooks(name_of(module, hooked))
        exact = hooked is None and not getattr(trainer.strategy.model, "_comm_hooks", ())
        ends = self._is_last_micro_batch
        if step.pair is not None and begins and ends:
            # The only micro-batch. With several, their graphs would fill the memory.
            step.graphs, backward = losses, partial(backward, retain_graph=True)
        adds = collected.add if step.pair is None else step.pair.add
        weight = pending.scalarization.weight if exact else None
        adds(losses, weight, share, backward, values)
        step.global_step = trainer.global_step
        if not ends:
            collected.settle()
            return
        self._complete(step, collected)

    def _watch(self, step: Step, pending: PendingLosses) -> None:
        """Collect task gradients that nobody trains with. What comes after is as if there had been no such pass."""
        module, losses = self._module, pending.by_task
        shared = trained_parameters(module)[0] if step.watched is None else step.watched.shared
        if not shared:
            return
        values, _, _ = self.across_ranks(losses, edited=False, changed=torch.zeros(()))
        if step.watched is None:
            # Nothing that is kept from step to step: which row is subtracted would depend on it.
            step.watched = Accumulator(shared, ExpectedNorms(), self.numerics, strict=False)
        with unchanged_buffers(module), preserved_rng():
            step.watched.add(losses, None, 1 / module.trainer.accumulate_grad_batches, lambda: None, values)
        if self._is_last_micro_batch:
            step.watched.complete()

    @property
    def _is_last_micro_batch(self) -> bool:
        """Whether the optimizer steps after this batch."""
        trainer = self._module.trainer
        ready = trainer.fit_loop.batch_idx + 1
        is_last: bool = trainer.is_last_batch or ready == trainer.num_training_batches
        return is_last or ready % trainer.accumulate_grad_batches == 0

    def _collect(self, step: Step, shared: list[Parameter], whole: bool, values: dict[str, float]) -> Accumulator:
        """What collects the rows of a step that begins: all of them, or a pair if that is enough."""
        kept, numerics = self._kept, self.numerics
        lazily = step.wants_pair and not (step.wants_gradients or self._aggregates(step))
        task = kept.expected.smallest(values) if lazily else None
        if task is not None:
            step.pair = TaskPair(task, shared, numerics, kept.pair_matrix)
            return step.pair.accumulator
        step.accumulator = Accumulator(shared, kept.expected, numerics, kept.matrix, strict=whole)
        return step.accumulator

    def conflicts(self) -> bool:
        """Whether the task of a step with a pair may conflict with the mean. Look at all rows then."""
        step = self._kept.step
        return step is not None and step.pair is not None and step.pair.conflicts

    def expand(self) -> None:
        """Compute the other rows of a step with a pair. ``.grad`` stays as it is."""
        step, trainer = self._kept.step, self._module.trainer
        assert step is not None
        assert step.pair is not None
        share, spare = 1 / trainer.accumulate_grad_batches, self._kept.matrix
        if step.graphs is not None:
            batches: Iterable[dict[str, Tensor]] = [step.graphs]
            step.accumulator = step.pair.expanded(batches, share, self._kept.expected, spare)
        else:
            with torch.enable_grad(), self.without_trace():
                batches = (self.replay(batch) for batch in step.batches)
                step.accumulator = step.pair.expanded(batches, share, self._kept.expected, spare)
        step.graphs = None
        gradients = step.accumulator.gradients
        if gradients is not None and not gradients.is_finite and gradient_scaler(trainer) is None:
            check_finite(dict(zip(gradients.names, gradients.norms.tolist(), strict=True)), "The gradient")

    def _complete(self, step: Step, accumulator: Accumulator) -> None:
        gradients = accumulator.complete()
        if gradients is None:
            return
        scaled = gradient_scaler(self._module.trainer) is not None
        if gradients.is_finite:
            # Before anybody else sees `.grad`: an edit of it then holds for the aggregation.
            self._aggregate(step, gradients, self.numerics.loss_scale)
        elif scaled:
            # The scaler looks at `.grad` only. If a row is not finite, this makes the scaler skip the step.
            trace = gradients.gramian.sum() * 0
            for parameter in accumulator.shared:
                if parameter.grad is not None and not parameter.grad.is_sparse:
                    parameter.grad.add_(trace)
                    break
        else:
            check_finite(dict(zip(gradients.names, gradients.norms.tolist(), strict=True)), "The gradient")
        if step.wants_batches:
            step.mark = GradMark(self._module.parameters())

    def _aggregates(self, step: Step | None) -> bool:
        """Whether a step combines task gradients of the parameters."""
        return self.method.aggregates and (step is None or step.weights is None)

    def _note_weights(self, step: Step) -> None:
        """Keep the weights of a step that is over for the next ones, or count that it has reused some."""
        method, kept = self.method, self._kept.task_weights
        if step.weights is not None:
            kept.age += 1
        elif method.keeps_weights and isinstance(method, AggregatorMethod) and method.weights is not None:
            kept.renew(*method.weights)
            method.weights = None

    def _aggregate(self, step: Step, gradients: TaskGradients, loss_scale: float = 1.0) -> None:
        """Write the aggregation of the task gradients into ``.grad`` of the shared parameters."""
        module, method, found = self._module, self.method, gradients.with_gradient
        if step.aggregated or not self._aggregates(step) or not found.names:
            return
        assert step.accumulator is not None
        shared = step.accumulator.shared
        if step.wants_batches:
            step.method_before = snapshot(method.wrapped)
        with named_errors(method.wrapped, module.trainer.global_step):
            write_gradient(method.aggregate(found, self.names, shared, Ranks.of(module)), shared, loss_scale)
        step.aggregated = True
