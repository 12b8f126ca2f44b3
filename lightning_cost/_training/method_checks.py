"""Checks of a multi-task method: of the object, of the number of tasks, and of what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchjd.aggregation import Aggregator, MoDoWeighting, SDMGradWeighting
from torchjd.scalarization import Scalarizer

from lightning_cost._lightning.rng import preserved_rng
from lightning_cost._training.method_state import changed_without_backward, of_unknown_state, snapshot

__all__: list[str] = []

# Options of TorchJD's methods that have an entry for each task.
_PER_TASK = frozenset(
    {
        "initial_weights",
        "leak",
        "min_losses",
        "n_byzantine",
        "n_selected",
        "n_tasks",
        "pref_vector",
        "reference",
        "shape",
        "tau",
        "trim_number",
        "weights",
    }
)


def check_assigned(module: LightningModule) -> None:
    """Refuse a module that has a multi-task method, but not as ``mtl_method``.

    Raises:
        MisconfigurationException: If it is so.
    """
    if hasattr(module, "mtl_method"):
        return
    places = [*(vars(base) for base in type(module).__mro__), dict(module.named_children())]
    for name, value in ((name, value) for place in places for name, value in place.items()):
        if isinstance(value, (Aggregator, Scalarizer)):
            raise MisconfigurationException(
                f"{type(module).__name__} has {type(value).__name__} as `{name}`, but no `mtl_method`, so it would"
                " train the mean of the losses. Call it `mtl_method`, or set `self.mtl_method = None` for the mean."
            )


def check_method(method: nn.Module, module: LightningModule) -> None:
    """Refuse methods that cannot be trained like this.

    Raises:
        MisconfigurationException: If the method needs several batches a step, or if parameters of it are in no
            optimizer.
    """
    for part in method.modules():
        if isinstance(part, (MoDoWeighting, SDMGradWeighting)):
            raise MisconfigurationException(
                f"{type(part).__name__} weighs the tasks by the products of their gradients on two independent batches,"
                " but a training step has one batch. Use another method, such as torchjd.aggregation.MGDA."
            )
    trained = {
        parameter
        for optimizer in module.trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    by_itself = changed_without_backward(method)
    missing = [
        f"mtl_method.{name}"
        for name, parameter in method.named_parameters()
        if parameter.requires_grad and parameter not in trained and name not in by_itself
    ]
    if missing:
        raise MisconfigurationException(
            f"{type(method).__name__} learns {', '.join(missing)}, but no optimizer has it. Pass `self.parameters()` to"
            " the optimizer in `configure_optimizers`, not only the parameters of the network."
        )
    for name in of_unknown_state(method):
        rank_zero_warn(
            f"The library does not know what {name} remembers from step to step. A checkpoint holds its parameters and"
            " buffers only, and a resumed run starts without the rest. Give it `get_extra_state` and `set_extra_state`"
            " (of torch.nn.Module) to save the rest."
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_number_of_tasks(method: nn.Module, names: Sequence[str], device: torch.device) -> None:
    """Try a method of TorchJD on as many tasks as there are, and leave no trace.

    Args:
        method: The method.
        names: The tasks.
        device: Where it works.

    Raises:
        MisconfigurationException: If it fails.
    """
    if not type(method).__module__.startswith("torchjd."):
        return
    memory = snapshot(method)
    try:
        with preserved_rng(), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            example = torch.eye(len(names)) if isinstance(method, Aggregator) else torch.ones(len(names))
            method(example.to(device, torch.float32))
    except Exception as error:
        options = [name for name in inspect.signature(type(method).__init__).parameters if name in _PER_TASK]
        advice = f"Set its option `{'` or `'.join(options)}` to match." if options else "Use another method."
        advice += " Return None for a task without labels in a batch, so that all tasks are known from the first batch."
        text = str(error).rstrip(".")
        raise MisconfigurationException(
            f"`mtl_method` {method!r} does not work with the {len(names)} tasks {list(names)}: {text}. {advice}"
        ) from error
    finally:
        memory.restore()


@contextmanager
def named_errors(method: Any, step: int) -> Iterator[None]:
    """Say in an error of a method which method it was, and in which step.

    Args:
        method: The method.
        step: ``trainer.global_step``.

    Raises:
        ValueError: If the method raises one.
        RuntimeError: If the method raises another error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        message = f"`mtl_method` {type(method).__name__} failed at step {step}: {error}"
        raise kind(message) from error


def check_tensor(result: object, shape: tuple[int, ...]) -> Tensor:
    """Refuse what a method returned if it is no tensor of a shape.

    Raises:
        TypeError: If it is refused.
    """
    if not isinstance(result, Tensor) or result.shape != shape:
        kind = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"type {type(result).__name__}"
        raise TypeError(f"it must return a tensor of shape {shape}; got {kind}.")
    return result


def check_scalarization(values: Tensor, total: Tensor, weights: Tensor, finite: Sequence[bool]) -> None:
    """Refuse a scalarization that cannot be trained.

    Args:
        values: The losses, shape ``(K,)``.
        total: Their scalarization.
        weights: The derivatives, shape ``(K,)``.
        finite: Whether the losses are finite, and whether the rest is.

    Raises:
        ValueError: If it, or a derivative, is not finite, although the losses are.
    """
    of_losses, of_method = finite
    if of_losses and not of_method:
        raise ValueError(
            f"for the losses {values.tolist()} it returned {float(total.detach())} with the derivatives"
            f" {weights.tolist()}, which are not all finite. The parameters are as they were before this step. Keep the"
            " losses inside of what the method is defined for (many take a logarithm or divide by a loss), or use"
            " another method."
        )


def check_aggregation(result: object, shape: tuple[int, ...]) -> Tensor:
    """Refuse an aggregation, or the weights of one, that cannot be trained.

    Args:
        result: What the aggregator returned for finite task gradients.
        shape: The shape that it must have.

    Raises:
        TypeError: If it is no tensor of this shape.
        ValueError: If it is not finite.
    """
    checked = check_tensor(result, shape)
    if not bool(torch.isfinite(checked.detach().sum())):
        raise ValueError(
            "the task gradients are finite, but what it returned is not. The parameters are as they were before this"
            " step. Use another method, or change its options."
        )
    return checked


def has_changed(loss: Tensor, total: Tensor, micro_batches: int, loss_scale: float) -> Tensor:
    """Whether a loss is not the scalarization: a scalar that is not read yet.

    Args:
        loss: What Lightning differentiates.
        total: The scalarization of the batch.
        micro_batches: What Lightning has divided it by.
        loss_scale: What a gradient scaler has multiplied it with.
    """
    # In the order of Lightning, so that both round alike.
    expected = total.detach() / micro_batches * loss_scale
    return (loss.detach() != expected) & torch.isfinite(expected)


def refuse_changed_loss(module: Any, loss: Tensor, total: Tensor, factor: float) -> NoReturn:
    """Refuse a loss that is not the scalarization; see :func:`has_changed`.

    Raises:
        MisconfigurationException: Always.
    """
    raise MisconfigurationException(
        f"{type(module).__name__}.training_step returned a loss other than the one of MultiTaskMixin"
        f" ({float(loss.detach()) / factor:g} instead of {float(total.detach()):g}). What it adds belongs to no task,"
        " so no multi-task method can weigh it: add it to the losses that `task_losses` returns."
    )


def warn_of_hooks(name: str) -> None:
    """Say that a hook of a parameter edits gradients that nobody uses."""
    rank_zero_warn(
        f"`{name}` has a hook of `register_post_accumulate_grad_hook`. What it does to `.grad` reaches neither the task"
        " gradients nor their aggregation. Use `register_hook`, or edit the gradients in `on_before_optimizer_step`."
    )
