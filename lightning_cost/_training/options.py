"""Checks of how a module wants its task gradients to be aggregated."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torchjd.aggregation import (
    Aggregator,
    Constant,
    GradDrop,
    GramianWeightedAggregator,
    Mean,
    Random,
    Sum,
    TrimmedMean,
)

from lightning_cost._training.method import weighs

__all__: list[str] = []

_PLACES = ("parameters", "features")
# What they do to an element depends on no other element, or on no gradient at all.
_ELEMENTWISE: tuple[type[Aggregator], ...] = (Constant, GradDrop, Mean, Random, Sum, TrimmedMean)


def takes_features(module: Any) -> bool:
    """Whether an aggregator of the module gets the gradients of the features."""
    return bool(module.task_gradients_of == "features")


def check_options(module: Any) -> None:
    """Refuse values of ``reduce_dtype``, ``task_gradients_of`` and ``weights_every`` that cannot be followed.

    Raises:
        MisconfigurationException: If there is one, or if it has no effect.
    """
    kind, wrapped, size = type(module).__name__, getattr(module, "mtl_method", None), module.trainer.world_size
    place, every = module.task_gradients_of, module.weights_every
    if module.reduce_dtype is not None and not getattr(module.reduce_dtype, "is_floating_point", False):
        raise MisconfigurationException(
            f"`reduce_dtype` of {kind} must be a floating torch.dtype such as torch.bfloat16, or None; got"
            f" {module.reduce_dtype!r}."
        )
    if place not in _PLACES:
        raise MisconfigurationException(
            f"`task_gradients_of` of {kind} must be 'parameters' or 'features'; got {place!r}."
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise MisconfigurationException(f"`weights_every` of {kind} must be a positive integer; got {every!r}.")
    for name, value, default in (("task_gradients_of", place, "parameters"), ("weights_every", every, 1)):
        if value != default and not isinstance(wrapped, Aggregator):
            raise MisconfigurationException(
                f"`{name}={value!r}` of {kind} has no effect with `mtl_method={wrapped!r}`: only a"
                f" torchjd.aggregation.Aggregator combines task gradients. Leave it at {default!r}."
            )
    if every > 1 and not weighs(wrapped):
        raise MisconfigurationException(
            f"`weights_every={every}` of {kind} reuses task weights, but {type(wrapped).__name__} combines the task"
            " gradients by more than weights, or has a hook that waits for each call. Leave it at 1, or use a method"
            " with weights, such as torchjd.aggregation.UPGrad."
        )
    if place == "features" and size > 1 and not isinstance(wrapped, (GramianWeightedAggregator, *_ELEMENTWISE)):
        raise MisconfigurationException(
            f"`task_gradients_of='features'` of {kind} with {size} processes takes a method that needs the inner"
            f" products of the task gradients only, since no process has the features of all; {type(wrapped).__name__}"
            " needs more. Use such a method, such as torchjd.aggregation.UPGrad, or leave it at 'parameters'."
        )
