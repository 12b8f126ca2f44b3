"""Evaluating the task losses of a module, for the first time or again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_cost._lightning.checks import gradient_scaler, loss_scale_of
from lightning_cost._lightning.ranks import Ranks
from lightning_cost._lightning.recording import RecordedBatch, Scene, preserved
from lightning_cost._training.evaluate import (
    Numerics,
    Scalarization,
    check_finite,
    check_losses,
    mean_losses,
    present,
    repeated,
    unrepeatable_message,
    values_of,
)
from lightning_cost._training.features import captured_outputs, check_features, feature_rows, with_gradient
from lightning_cost._training.kept import Kept
from lightning_cost._training.method import FeatureMethod, Method, make_method
from lightning_cost._training.method_checks import check_number_of_tasks, named_errors
from lightning_cost._training.method_state import snapshot
from lightning_cost._training.options import takes_features
from lightning_cost._training.reused import weighted_total
from lightning_cost._training.shared import shared_parameters, trained_parameters
from lightning_cost._training.step import Step

__all__: list[str] = []

# How often a method that compares losses looks whether they come back without an optimizer step.
_REPEAT_EVERY = 100


class Evaluator:
    """Evaluates and scalarizes the task losses of one module.

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
        options = takes_features(self._module), self._module.weights_every != 1
        if self._kept.method.wrapped is not wrapped or self._kept.options != options:
            self._kept.method, self._kept.options = make_method(wrapped, *options), options
        return self._kept.method

    @property
    def numerics(self) -> Numerics:
        """What the Trainer does to losses and gradients in this step."""
        return Numerics(Ranks.of(self._module), loss_scale_of(self._module.trainer), self._module.reduce_dtype)

    def evaluate(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Evaluate and check ``task_losses``. A task without a loss is left out."""
        if self.method.takes_features and torch.is_grad_enabled():
            with captured_outputs(self._module) as outputs:
                losses = check_losses(self._module.task_losses(batch, batch_idx))
            self._kept.features = outputs()
        else:
            losses = check_losses(self._module.task_losses(batch, batch_idx))
        self._learn_names(tuple(losses))
        return present(losses, self.names)

    def scene(self, batch: Any, batch_idx: int) -> Scene:
        """What ``task_losses`` is about to see."""
        clone, written = self._kept.clones_batches, self._kept.written
        scene: Scene = Scene(self._module, batch, batch_idx, clone, written or (), thorough=written is None)
        return scene

    def record(self, scene: Scene, losses: dict[str, Tensor]) -> RecordedBatch:
        """The record of a batch, after its losses were evaluated."""
        changed, written = scene.changed_tensor(), scene.written_parameters()
        self._kept.clones_batches |= changed is not None
        changed = changed or next(iter(written), None)
        self._kept.written = (self._kept.written or set()) | set(written.values())
        return RecordedBatch(scene, {name: loss.detach() for name, loss in losses.items()}, changed)

    def replay(self, record: RecordedBatch) -> dict[str, Tensor]:
        """Evaluate ``task_losses`` on a recorded batch again, from what it saw and with the precision of its step."""
        batch = record.scene.restore()
        with self._module.trainer.precision_plugin.train_step_context():
            return self.evaluate(batch, record.scene.batch_idx)

    def scalarize_again(self, losses: dict[str, Tensor]) -> Scalarization:
        """Scalarize losses of :meth:`replay` as :meth:`training_step` does."""
        with self._module.trainer.precision_plugin.train_step_context():
            return self.scalarize(losses, Ranks.of(self._module))

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Restore on exit what evaluations change, the method's memory included. Gradients and parameters are kept."""
        # A method that is a class attribute is no submodule.
        method = snapshot(self.method.wrapped)
        self._kept.replaying = True
        try:
            with preserved(self._module, self._kept.written or ()):
                try:
                    yield
                finally:
                    method.restore()
        finally:
            self._kept.replaying, self._kept.features = False, []

    def scalarize(self, losses: dict[str, Tensor], ranks: Ranks) -> Scalarization:
        """Scalarize the losses of a batch by the method. See :meth:`Method.scalarize`."""
        trainer, step = self._trainer, self._kept.step
        training = trainer is not None and trainer.training and step is not None
        if training and losses and self.method.takes_features:
            self._check_features(losses)
        with named_errors(self.method.wrapped, 0 if trainer is None else trainer.global_step):
            scalarization = self.method.scalarize(losses, self.names, ranks)
            if not training or step is None:
                return scalarization
            if step.weights is not None and losses:
                shared = {id(parameter) for parameter in shared_parameters(self._module)}
                others = [p for p in self._module.parameters() if p.requires_grad and id(p) not in shared]
                total = weighted_total(losses, step.weights, others, self.numerics.loss_scale)
                return Scalarization(total, None)
            if self.method.takes_features and step.weights is None:
                return Scalarization(scalarization.total + self._change_of_features(losses, ranks), None)
            return scalarization

    def _check_features(self, losses: dict[str, Tensor]) -> None:
        shared = trained_parameters(self._module)[0]
        if shared and not self._kept.checked_features:
            check_features(self._module, losses, self._kept.features, shared)
            self._kept.checked_features = True

    def _change_of_features(self, losses: dict[str, Tensor], ranks: Ranks) -> Tensor:
        """A zero that turns the gradient of the features into their aggregation.

        Raises:
            ValueError: If a gradient is not finite, and no gradient scaler waits for that.
        """
        module, features = self._module, self._kept.features
        assert isinstance(self.method, FeatureMethod)
        if not trained_parameters(module)[0]:
            # All that the tasks share is frozen for now.
            return ranks.mean_(torch.zeros((), device=module.device))
        rows = feature_rows(losses, self.names, features, self.numerics.loss_scale, ranks.device)
        change = self.method.change(rows, self.names, ranks)
        if change is None and gradient_scaler(module.trainer) is None:
            check_finite(dict(zip(self.names, rows.norms.tolist(), strict=True)), "The gradient of the features")
        # With a gradient that is not finite, the scaler skips the step.
        return with_gradient(features, torch.full_like(rows.matrix[0], torch.nan) if change is None else change)

    def evaluate_again(self, batches: Sequence[RecordedBatch]) -> Tensor:
        """The task losses of recorded batches here, averaged over them and over the processes, shape ``(K,)``."""
        ranks = self.numerics.ranks
        # With gradients: a `task_losses` that differentiates something itself relies on them.
        with torch.enable_grad(), self.without_trace():
            losses = [values_of(self.replay(batch), self.names).to(ranks.device) for batch in batches]
        return mean_losses(losses, ranks)

    def nothing(self) -> Tensor:
        """Zero, as a function of every parameter that DDP waits for."""
        module, ignored = self._module, set(self._module._ddp_params_and_buffers_to_ignore)
        waited = [p for name, p in module.named_parameters() if p.requires_grad and name not in ignored]
        return torch.stack([parameter.reshape(-1)[:1].sum().float() for parameter in waited]).sum() * 0

    def look_at_losses(self) -> None:
        """Refuse the last losses if they are not finite and nobody has looked at them yet.

        Raises:
            ValueError: If one is not finite.
        """
        late, self._kept.late = self._kept.late, None
        if late is not None:
            late.finish(self._global_step)

    @property
    def _global_step(self) -> int:
        return 0 if self._trainer is None else self._trainer.global_step

    def across_ranks(
        self, losses: dict[str, Tensor], edited: bool, changed: Tensor
    ) -> tuple[dict[str, float], bool, bool]:
        """What all processes must know before they differentiate, by one read of the device.

        Args:
            losses: The losses of this process.
            edited: Whether somebody has edited ``.grad``.
            changed: Whether somebody has changed the loss that Lightning differentiates, a scalar.

        Returns:
            The losses of all tasks, averaged over the processes, and whether one of them says yes to the two questions.
        """
        ranks = self.numerics.ranks
        mine = values_of(losses, self.names).to(ranks.device)
        flags = torch.stack([mine.new_tensor(float(edited)), changed.to(mine)])
        *values, edits, changes = ranks.mean_(torch.cat([mine, flags])).tolist()
        return dict(zip(self.names, values, strict=True)), edits > 0, changes > 0

    def comparable(self, step: Step, before: Tensor, moved: bool) -> bool:
        """Whether the losses of a step can be compared with those after it.

        Raises:
            RuntimeError: If they cannot, because ``task_losses`` is not repeatable.
        """
        ranks, kept = self.numerics.ranks, self._kept
        if ranks.any_of([any(batch.changed_tensor is not None for batch in step.batches)])[0]:
            return False
        due = kept.comparisons % _REPEAT_EVERY == 0 and not moved and bool(torch.isfinite(before).all())
        kept.comparisons += 1
        if due:
            changes = repeated(before, self.evaluate_again(step.batches), self.names)
            if changes:
                raise RuntimeError(unrepeatable_message(type(self.method.wrapped).__name__, changes))
        return True

    @property
    def _trainer(self) -> Trainer | None:
        trainer: Trainer | None = self._module._trainer
        return trainer

    def _learn_names(self, names: tuple[str, ...]) -> None:
        """Note the tasks of the run. A task may be missing in the first batch."""
        kept, module = self._kept, self._module
        new = [name for name in names if name not in kept.names]
        if not kept.names:
            kept.names = self._common_names(names)
        elif new and not kept.replaying:
            if self._trainer is not None and Ranks.of(module).size > 1:
                raise ValueError(
                    f"`task_losses` returned {', '.join(map(repr, new))} after the first batch, where no process had"
                    f" it; the tasks are {list(kept.names)}. With several processes all tasks must be known from the"
                    " first batch: return None for a task without labels."
                )
            rank_zero_warn(
                f"`task_losses` returned {', '.join(map(repr, new))} for the first time, beside the tasks"
                f" {list(kept.names)}. It counts as a task from now on. To have all tasks from the first batch, return"
                " None for a task without labels instead of leaving it out."
            )
            kept.names += tuple(new)
        wrapped = self.method.wrapped
        if kept.tried != (wrapped, kept.names):
            kept.tried = wrapped, kept.names
            if wrapped is not None:
                check_number_of_tasks(wrapped, kept.names, module.device)

    def _common_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names of all processes, in the same order on each. Rows are averaged by their position."""
        everywhere = [names] if self._trainer is None else Ranks.of(self._module).gather(names)
        common = tuple(dict.fromkeys(name for others in everywhere for name in others))
        if not common:
            raise ValueError(
                f"`task_losses` of {type(self._module).__name__} returned no task; got {{}}. Return a scalar loss for"
                " each task, and None for a task without labels."
            )
        return common
