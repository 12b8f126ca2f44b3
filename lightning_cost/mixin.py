"""Gradient-based multi-task learning under Lightning's automatic optimization."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torchjd.aggregation import Aggregator, GramianWeightedAggregator, WeightedAggregator
from torchjd.scalarization import Scalarizer
from typing_extensions import override

from lightning_cost.distributed import Ranks
from lightning_cost.gradients import GradientBuffer, TaskGradients, columns, combine
from lightning_cost.methods import scalarize
from lightning_cost.replay import RecordedBatch, Remembered
from lightning_cost.rng import RngState
from lightning_cost.support import (
    check_strategy,
    check_unscaling,
    gradient_scaler,
    keep_what_compiled_code_saves,
    loss_scale_of,
)
from lightning_cost.upkeep import Upkeep, ignored_by_ddp

__all__ = ["MultiTaskMixin"]

_CHECKPOINT_KEY = "lightning_cost"


@dataclass(frozen=True)
class TaskLosses:
    """The task losses of one batch.

    Attributes:
        by_task: Scalar losses with a graph, in the order of the tasks.
    """

    by_task: dict[str, Tensor]

    @property
    def values(self) -> Tensor:
        """The losses without graph, shape ``(K,)``."""
        return torch.stack([loss.detach() for loss in self.by_task.values()])


@dataclass(frozen=True)
class StepLosses(TaskLosses):
    """The task losses of one batch and the scalar that is differentiated for everything that is not shared.

    Attributes:
        total: Their scalarization.
        weight: The common factor of the task losses in ``total``; ``None`` if they differ.
    """

    total: Tensor
    weight: float | None


class MultiTaskMixin(LightningModule):
    """Trains a LightningModule with several task losses and any TorchJD method.

    Subclass it before ``LightningModule``, write :meth:`task_losses` instead of ``training_step``, and name the shared
    module. Everything else is Lightning's automatic optimization: one optimizer, any scheduler, clipping, accumulation,
    checkpoints.

    What the shared parameters are updated with follows ``mtl_method``:

    - ``None``: the gradient of the mean of the losses (linear scalarization, LS).
    - a :class:`torchjd.scalarization.Scalarizer`: the gradient of its value.
    - a :class:`torchjd.aggregation.Aggregator`: its aggregation of the task gradients. The other parameters (the heads)
      get the gradient of the sum of the losses, that is of their own.

    Methods that remember something from step to step (DWA, FAMO, Nash-MTL, ...) are looked after, in checkpoints and
    on several processes. Those that learn parameters (UW, IMTL-L) need them in the optimizer: ``self.parameters()``.

    The task losses are logged as ``train/<task>_loss``, their scalarization as ``train/loss``.

    If you override ``on_fit_start``, ``training_step``, ``backward``, ``on_before_optimizer_step``, ``teardown`` or a
    checkpoint hook, call ``super()`` in them. To add a regularization term, add it to the task losses: a term that only
    the returned loss holds belongs to no task.

    Attributes:
        shared_module: Name of the attribute that holds the shared module, or a sequence of names. Dotted paths reach
            into submodules. All their parameters that require a gradient are shared.
        mtl_method: The multi-task method; set it in ``__init__`` after ``super().__init__()``.
        reduce_dtype: What DDP sends the task gradients as, such as ``torch.bfloat16``; ``None`` for their own type.

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
    # Annotated only: a class attribute would hide the submodule that `self.mtl_method = ...` registers.
    mtl_method: Aggregator | Scalarizer | None
    reduce_dtype: torch.dtype | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gradient_buffer = GradientBuffer()
        self._upkeep = Upkeep()
        self._moved = False
        self._ignored: tuple[str, ...] = ()
        self._task_names: tuple[str, ...] | None = None
        self._step_losses: StepLosses | None = None
        self._recorded: list[RecordedBatch] = []
        self._to_record: RecordedBatch | None = None
        self._recording = False
        self._requested = False
        self._replaying = False
        self._has_task_gradients = False
        self._unused_since_step: int | None = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        # Between forward and backward the module holds a graph, which cannot be copied and belongs to no copy.
        return {**super().__getstate__(), "_step_losses": None}

    def task_losses(self, batch: Any, batch_idx: int) -> Mapping[str, Tensor]:
        """Compute the loss of every task on a batch. This is what you write.

        It is called once a training step, and again on the same batch while a teleport searches. Buffers, metrics,
        random numbers, ``self.log`` and the state of ``mtl_method`` leave no trace of those further calls. Guard other
        side effects, such as appending to a list or counting, by ``if not self.replaying``.

        Args:
            batch: The batch.
            batch_idx: Its index in the epoch.

        Returns:
            Scalar losses by task name, at least two to train more than one task. The names must stay the same for a
            run. To weigh the tasks, weigh the losses here.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `task_losses(self, batch, batch_idx)`: a scalar loss for each task."
        )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks, in the order of the first step; empty before it."""
        return self._task_names or ()

    @property
    def task_gradients(self) -> TaskGradients | None:
        """The task gradients of the current optimizer step.

        Available after ``backward`` (in ``on_after_backward``, ``on_before_optimizer_step`` and later) if somebody
        needs them in this step: an aggregator, a trigger check that is due, or :meth:`request_task_gradients`.
        ``None`` otherwise, and then the step cost what plain Lightning costs.

        They are averaged over the processes of DDP, and without the scale of a gradient scaler. Under a scaler they may
        be infinite or not a number (see ``is_finite``): it skips such a step. Between accumulated batches they are the
        sum over those so far, in this process alone.
        """
        if not self._has_task_gradients:
            return None
        if self._gradient_buffer.gradients is None and self._gradient_buffer.is_open:
            self._gradient_buffer.complete(loss_scale=loss_scale_of(self.trainer))
        return self._gradient_buffer.gradients

    def request_task_gradients(self) -> None:
        """Have the coming backward passes compute the task gradients, until the next optimizer step.

        Call it before ``training_step``, for example in ``on_train_batch_start`` of a callback, and on every process.
        """
        keep_what_compiled_code_saves()
        self._requested = True

    def record_batches(self) -> None:
        """Have the coming training steps keep their batches, until the next optimizer step."""
        self._recording = True

    @property
    def recorded_batches(self) -> list[RecordedBatch]:
        """The batches of the current optimizer step, if :meth:`record_batches` was called before them."""
        return self._recorded

    def exchange_task_gradients(self, buffer: GradientBuffer) -> GradientBuffer:
        """Update with other task gradients, whose ordinary gradients are in ``.grad``; returns the old buffer."""
        self._moved = True
        old, self._gradient_buffer = self._gradient_buffer, buffer
        return old

    def discard_step(self) -> None:
        """Forget an optimizer step that was interrupted. Callbacks that look at steps call it when a fit starts."""
        self._requested = self._recording = False
        self._recorded, self._to_record = [], None
        self._step_losses = self._unused_since_step = None
        self._has_task_gradients = self._moved = False
        self._gradient_buffer.discard()
        self._upkeep.discard_step()

    @property
    def replaying(self) -> bool:
        """Whether a teleport evaluates :meth:`task_losses` again: leave out side effects of your own then."""
        return self._replaying

    def shared_modules(self) -> list[tuple[str, nn.Module]]:
        """The modules that ``shared_module`` names, with their paths.

        Raises:
            MisconfigurationException: If there is no such module.
        """
        names = [self.shared_module] if isinstance(self.shared_module, str) else self.shared_module
        if "shared_module" in self._modules or not isinstance(names, Sequence):
            raise MisconfigurationException(
                f"`shared_module` of {type(self).__name__} must be the name of the attribute that holds the shared"
                f" module, such as 'backbone', or a list of names; got {self._modules.get('shared_module', names)!r}."
            )
        return [(name, self._shared_module(name)) for name in names]

    def shared_parameters(self) -> list[Parameter]:
        """The parameters of ``shared_module`` that require a gradient, each once.

        Raises:
            MisconfigurationException: If ``shared_module`` names nothing, or nothing that requires a gradient.
        """
        shared: dict[Parameter, None] = {}
        for _, module in self.shared_modules():
            shared.update(dict.fromkeys(parameter for parameter in module.parameters() if parameter.requires_grad))
        if not shared:
            raise MisconfigurationException(
                f"`shared_module={self.shared_module!r}` of {type(self).__name__} has no parameter that requires a"
                " gradient. Name the module whose parameters the tasks share, and unfreeze some of them."
            )
        return list(shared)

    @override
    def on_fit_start(self) -> None:
        """Refuse what is not supported, and prepare compiled code for several backward passes, before any runs."""
        super().on_fit_start()
        # An earlier fit may have ended in the middle of a step.
        self.discard_step()
        if self.reduce_dtype is not None and not getattr(self.reduce_dtype, "is_floating_point", False):
            raise MisconfigurationException(
                f"`reduce_dtype` of {type(self).__name__} must be a floating torch.dtype such as torch.bfloat16, or"
                f" None; got {self.reduce_dtype!r}."
            )
        if not self.automatic_optimization:
            raise MisconfigurationException(
                f"MultiTaskMixin needs automatic optimization; {type(self).__name__} sets"
                " `automatic_optimization = False`."
            )
        if isinstance(getattr(self, "mtl_method", None), Aggregator):
            check_strategy(self.trainer)
            check_unscaling(self.trainer)
            self.shared_parameters()
            keep_what_compiled_code_saves()
        self._upkeep.start(self)

    @override
    def teardown(self, stage: str) -> None:
        """Leave the optimizer as it was."""
        super().teardown(stage)
        self._upkeep.stop()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute, check and log the task losses; returns their scalarization. See :meth:`task_losses`."""
        self._check_gradients_were_used()
        # A validation step may call this one, in the middle of an accumulation window.
        training = self._trainer is not None and self.trainer.training
        if training and self.trainer.fit_loop.batch_idx % self.trainer.accumulate_grad_batches == 0:
            # The window before may have been abandoned: a hook can end an epoch without an optimizer step.
            self._recorded = []
            self._gradient_buffer.discard()
        if training and self._upkeep.begin_batch(self):
            self._recording = True
        rng = RngState.capture() if self._recording and training else None
        evaluated = self.evaluate_tasks(batch, batch_idx)
        validating = self._trainer is not None and not training
        # Gradient scalers expect losses that overflow, and skip the step: the method must not remember them.
        scaled = self._trainer is not None and gradient_scaler(self.trainer) is not None
        remembered = Remembered(self) if validating or scaled else None
        losses = self.scalarize(evaluated)
        if remembered is not None and (validating or not bool(torch.isfinite(losses.total))):
            remembered.restore()
        if not scaled:
            self._check_finite(losses)
        self._to_record = None if rng is None else RecordedBatch(batch, batch_idx, rng, losses.values)
        self._step_losses = losses
        if self._trainer is not None:
            self.log_dict({f"train/{name}_loss": loss.detach() for name, loss in losses.by_task.items()})
            self.log("train/loss", losses.total.detach())
        return losses.total

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Collect the task gradients if anybody needs them, then run the ordinary backward."""
        losses, self._step_losses = self._step_losses, None
        self._has_task_gradients = self._requested or isinstance(getattr(self, "mtl_method", None), Aggregator)
        if self._has_task_gradients:
            if losses is None:
                raise MisconfigurationException(
                    f"{type(self).__name__}.training_step did not call `super().training_step(batch, batch_idx)`, so"
                    " its task losses are unknown. Write `task_losses` instead of `training_step`, or call super."
                )
            self._add_task_gradients(loss, losses)
        super().backward(loss, *args, **kwargs)
        if self._has_task_gradients and self._is_last_micro_batch():
            self._complete_task_gradients()
        # Not before: a batch for which `training_step` returns None never gets here.
        if self._to_record is not None:
            self._recorded.append(self._to_record)
            self._to_record = None

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Write the aggregation of the task gradients into ``.grad`` of the shared parameters."""
        if self._gradient_buffer.is_open:
            # Not those of the buffer: without a backward of the last micro-batch they are not completed yet.
            gradients = self.task_gradients
            self._gradient_buffer.close()
            method = getattr(self, "mtl_method", None)
            # Gradients that are not finite, which only a gradient scaler lets pass, are its reason to skip the step.
            if isinstance(method, Aggregator) and gradients is not None and gradients.is_finite:
                shared = self._gradient_buffer.shared
                _write_gradient(_aggregate(method, gradients, shared, Ranks.of(self)), shared)
        self._upkeep.before_step(self, self._recorded, self._moved)
        self._requested = self._moved = False
        self._recording = False
        self._recorded = []
        self._unused_since_step = None
        super().on_before_optimizer_step(optimizer)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the method remembers, and what decides which row comes by subtraction.

        So a resumed run does what an uninterrupted one does, and rounds as it does.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint[_CHECKPOINT_KEY] = {
            "rates": dict(self._gradient_buffer.rates),
            "method": self._upkeep.state_dict(self),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what :meth:`on_save_checkpoint` saved, if it is there."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(_CHECKPOINT_KEY, {})
        self._gradient_buffer.rates = dict(state.get("rates", {}))
        self._upkeep.load_state_dict(state.get("method", {}))

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """DDP asks for it. What a method changes without a backward would have DDP wait for gradients for ever."""
        return [*self._ignored, *ignored_by_ddp(self)]

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Iterable[str]) -> None:
        self._ignored = tuple(names)

    def evaluate_tasks(self, batch: Any, batch_idx: int) -> TaskLosses:
        """Evaluate and check :meth:`task_losses`."""
        return TaskLosses(self._checked(self.task_losses(batch, batch_idx)))

    def scalarize(self, losses: TaskLosses) -> StepLosses:
        """Scalarize task losses by ``mtl_method``. In training, all processes must call it in the same order."""
        by_task = losses.by_task
        values = torch.stack(list(by_task.values()))
        method = getattr(self, "mtl_method", None)
        if method is None:
            return StepLosses(by_task, values.mean(), 1 / len(by_task))
        if isinstance(method, Aggregator):
            return StepLosses(by_task, values.sum(), 1.0)
        if isinstance(method, Scalarizer):
            # Validation may see more batches on one process than on another.
            training = self._trainer is not None and self.trainer.training
            return StepLosses(by_task, scalarize(method, values, Ranks.of(self) if training else Ranks()), None)
        raise MisconfigurationException(
            f"`mtl_method` must be a torchjd.aggregation.Aggregator, a torchjd.scalarization.Scalarizer or None for the"
            f" mean of the losses; got {method!r}."
        )

    def _add_task_gradients(self, loss: Tensor, losses: StepLosses) -> None:
        check_strategy(self.trainer)
        check_unscaling(self.trainer)
        micro_batches, loss_scale = self.trainer.accumulate_grad_batches, loss_scale_of(self.trainer)
        returned, expected = loss.detach(), losses.total.detach() / micro_batches * loss_scale
        if not torch.equal(returned, expected) and bool(torch.isfinite(expected)):
            unscaled = float(returned) * micro_batches / loss_scale
            raise MisconfigurationException(
                f"{type(self).__name__}.training_step returned a loss other than the one of MultiTaskMixin"
                f" ({unscaled:g} instead of {float(losses.total.detach()):g}). What it adds belongs to no"
                " task, so no multi-task method can weigh it: add it to the losses that `task_losses` returns."
            )
        # A communication hook may compress `.grad` on its way: what is left over is no row.
        exact = not getattr(self.trainer.strategy.model, "_comm_hooks", ())
        self._gradient_buffer.add(
            losses.by_task,
            self.shared_parameters(),
            1 / micro_batches,
            losses.weight if exact else None,
            Ranks.of(self).mean_(losses.values),
            loss_scale,
        )
        self._unused_since_step = self.trainer.global_step

    def _is_last_micro_batch(self) -> bool:
        trainer = self.trainer
        ready = trainer.fit_loop.batch_idx + 1
        is_last = trainer.is_last_batch or ready == trainer.num_training_batches
        return is_last or ready % trainer.accumulate_grad_batches == 0

    def _complete_task_gradients(self) -> None:
        loss_scale = loss_scale_of(self.trainer)
        gradients = self._gradient_buffer.complete(Ranks.of(self), loss_scale, self.reduce_dtype)
        if gradient_scaler(self.trainer) is not None:
            # The scaler looks at `.grad` only. What is not finite in a row makes it skip the step by this.
            trace = gradients.gramian.sum() * 0
            for parameter in self._gradient_buffer.shared:
                if parameter.grad is not None and not parameter.grad.is_sparse:
                    parameter.grad.add_(trace)
                    break
        elif not gradients.is_finite:
            norms = dict(zip(gradients.names, gradients.norms.tolist(), strict=True))
            raise _finiteness_error(norms, "The gradient")

    def _check_finite(self, losses: StepLosses) -> None:
        if not bool(torch.isfinite(losses.values).all()):
            raise _finiteness_error({n: float(loss.detach()) for n, loss in losses.by_task.items()}, "The loss")

    def _checked(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(losses, Mapping) or not losses:
            raise TypeError(
                "`task_losses` must return a dictionary of one scalar tensor a task, such as"
                f" {{'left': ..., 'right': ...}}; got {losses!r}."
            )
        for name, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.ndim != 0:
                kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
                raise ValueError(f"The loss of task {name!r} must be a scalar tensor; got {kind}. Reduce it first.")
        if self._task_names is None:
            self._task_names = self._common_names(tuple(losses))
        if set(losses) != set(self._task_names):
            missing = sorted(set(self._task_names) - set(losses))
            unknown = sorted(set(losses) - set(self._task_names))
            raise ValueError(
                "`task_losses` must return the same tasks at every step."
                f" Missing now: {missing}; not there before: {unknown}. For a batch without labels of a task, return a"
                " loss of zero that is connected to the graph, such as `0 * prediction.sum()`."
            )
        # Half precision would not even hold the scale of a gradient scaler.
        return {
            name: losses[name].float() if losses[name].dtype.itemsize < 4 else losses[name] for name in self._task_names
        }

    def _common_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names in the order of the first process: rows are averaged by their position."""
        everywhere = [names] if self._trainer is None else Ranks.of(self).gather(names)
        if any(set(others) != set(names) for others in everywhere):
            raise ValueError(f"`task_losses` must return the same tasks on every process; got {everywhere}.")
        return everywhere[0]

    def _check_gradients_were_used(self) -> None:
        stale = self._unused_since_step
        if stale is not None and self._trainer is not None and self.trainer.global_step > stale:
            raise MisconfigurationException(
                f"{type(self).__name__}.on_before_optimizer_step did not call"
                " `super().on_before_optimizer_step(optimizer)`, so the task gradients were never aggregated."
            )

    def _shared_module(self, path: str) -> nn.Module:
        try:
            module = reduce(getattr, path.split("."), self)
        except AttributeError as error:
            children = ", ".join(name for name, _ in self.named_children()) or "none"
            raise MisconfigurationException(
                f"`shared_module={self.shared_module!r}`: {type(self).__name__} has no attribute {path!r}. Set the"
                " class attribute `shared_module` (default 'backbone') to the name of the attribute that holds the"
                f" shared module; its submodules are: {children}."
            ) from error
        if not isinstance(module, nn.Module):
            raise MisconfigurationException(
                f"`shared_module={self.shared_module!r}`: attribute {path!r} must be a torch.nn.Module; got"
                f" {type(module).__name__}."
            )
        return module


def _finiteness_error(values: Mapping[str, float], what: str) -> ValueError:
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    return ValueError(
        f"{what} of task {', '.join(map(repr, bad))} is not finite: {bad}. The parameters are as they were before"
        " this step; look at the batch, the learning rate and the numerical range of that loss."
    )


def _aggregate(
    method: Aggregator, gradients: TaskGradients, shared: Sequence[Parameter], ranks: Ranks
) -> Iterator[Tensor]:
    """The aggregation of the task gradients, one flat piece a shared parameter.

    Methods that weigh the rows by their Gramian get the one that is known already. Hooks on such a method expect to be
    called, so that it is called itself if it has any. Some methods draw random numbers, which differ between the
    processes, so that the first process decides for all.
    """
    matrix = gradients.matrix
    if (
        not isinstance(method, GramianWeightedAggregator)
        or type(method).forward is not WeightedAggregator.forward
        or any((*module._forward_hooks, *module._forward_pre_hooks) for module in (method, method.weighting))
    ):
        yield from columns(ranks.first_(method(matrix)), shared)
        return
    weights = ranks.first_(method.gramian_weighting(gradients.gramian)).to(matrix)
    for piece in columns(matrix, shared):
        yield combine(piece, weights)


def _write_gradient(pieces: Iterable[Tensor], shared: Sequence[Parameter]) -> None:
    for parameter, piece in zip(shared, pieces, strict=True):
        # A parameter that no task touches has no gradient, and optimizers leave it alone: zeros would have it decay.
        if parameter.grad is None:
            continue
        view = piece.view(parameter.shape)
        if parameter.grad.is_sparse:
            parameter.grad = view.to(parameter.dtype).sparse_mask(parameter.grad.coalesce())
        else:
            parameter.grad.copy_(view)
