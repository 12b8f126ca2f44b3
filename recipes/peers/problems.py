"""A small MLP for studies of the other ways to teleport, and callbacks with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning.pytorch.callbacks import Callback
from torch import nn
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

from lightning_cost import Search, SymmetryTeleportCallback
from recipes.common.problem import Problem
from recipes.digits.data import CANVAS
from recipes.digits.model import DigitsModel
from recipes.digits.problems import DigitsProblem
from recipes.peers.group_action import GroupActionSearch
from recipes.peers.null_space import NullSpaceSearch
from recipes.peers.rescaling import RescalingSearch

__all__ = ["PROBLEMS", "MlpProblem", "as_mlp", "group_action", "null_space", "random_rescaling", "rescaling"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


def as_mlp(model: DigitsModel, hidden: int, activation: str) -> None:
    """Give a model of the digits a three-layer MLP as its backbone.

    Raises:
        ValueError: If `activation` is neither `relu` nor `leaky_relu`.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be one of {list(_ACTIVATIONS)}.")
    make = _ACTIVATIONS[activation]
    width = next(head.in_features for head in model.heads.values() if isinstance(head, nn.Linear))
    model.backbone = nn.Sequential(
        *(nn.Flatten(), nn.Linear(CANVAS * CANVAS, hidden), make()),
        *(nn.Linear(hidden, hidden), make(), nn.Linear(hidden, width)),
    )


@dataclass(frozen=True, kw_only=True)
class MlpProblem(DigitsProblem):
    """Overlaid digits with an MLP.

    Attributes:
        hidden: Units of its two hidden layers.
        activation: `relu` or `leaky_relu`.
    """

    multi_task_fields: ClassVar[frozenset[str]] = DigitsProblem.multi_task_fields

    hidden: int = 128
    activation: str = "leaky_relu"

    def make_model(self, tasks: Sequence[str], method: Aggregator | Scalarizer | None) -> DigitsModel:
        """A fresh model."""
        model = super().make_model(tasks, method)
        as_mlp(model, self.hidden, self.activation)
        return model


PROBLEMS = {
    "mlp": MlpProblem(
        title="narrow, imbalanced, MLP",
        tasks=("left", "right"),
        epochs=12,
        width=16,
        loss_weights={"left": 1.0, "right": 0.03},
    )
}
"""Problems by name."""


def _callback(seed: int, search: Search) -> Callback:
    return SymmetryTeleportCallback(seed=seed, search=search)


def rescaling(problem: Problem, seed: int) -> Callback:
    """Rescaling of hidden units along the gradient of the objective."""
    return _callback(seed, RescalingSearch("gradient"))


def random_rescaling(problem: Problem, seed: int) -> Callback:
    """Random rescaling of hidden units, which is accepted if the conflict becomes less."""
    return _callback(seed, RescalingSearch("random"))


def group_action(problem: Problem, seed: int) -> Callback:
    """A group action on hidden layers, along the gradient of the objective."""
    return _callback(seed, GroupActionSearch())


def null_space(problem: Problem, seed: int) -> Callback:
    """Projection onto the null space of the inputs of each layer."""
    return _callback(seed, NullSpaceSearch())
