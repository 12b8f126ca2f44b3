"""A module whose losses depend on more than its batch and its parameters."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.nets import Net


class Impure(Net):
    """Its losses depend on more than its batch and its parameters, in the ways that are switched on."""

    def __init__(self, ways: Any = (), mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.make_optimizer = lambda parameters: torch.optim.Adam(parameters, lr=1e-2)
        self.ways = tuple(ways)
        self.register_buffer("center", torch.zeros(4))
        self.register_buffer("late", None)
        self.hidden = torch.zeros(4)
        self.average = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.calls = 0
        self.queue: list[Tensor] = []
        self.table: dict[str, float] = {"scale": 1.0}
        self.noise = torch.Generator().manual_seed(0)
        self.python = random.Random(0)
        self.numpy = np.random.default_rng(0)

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        for way in self.ways:
            if hasattr(self, f"before_{way}"):
                getattr(self, f"before_{way}")(batch)
        features = self.features(batch)
        factor = torch.ones(())
        for way in self.ways:
            if hasattr(self, way):
                change = getattr(self, way)(features)
                features, factor = (change, factor) if change.ndim else (features, factor * change)
        losses = {task: loss * factor for task, loss in self.losses(batch, features).items()}
        if "pop" in self.ways:
            batch.pop("extra", None)
            assert batch.pop("ink") is not None
        if "missing" in self.ways and batch_idx % 3 == 1:
            losses["ink"] = None
        if "left out" in self.ways and batch_idx % 4 == 2:
            del losses["right"]
        return losses

    # What follows can be repeated: it starts from where the step started.

    def buffer(self, features: Tensor) -> Tensor:
        self.center.lerp_(features.detach().mean(dim=0), 0.3)
        return features - self.center

    def late_buffer(self, features: Tensor) -> Tensor:
        mean = features.detach().mean(dim=0)
        self.late = mean if self.late is None else 0.5 * self.late + 0.5 * mean
        return features - self.late

    def frozen_parameter(self, features: Tensor) -> Tensor:
        self.average.lerp_(features.detach().mean(dim=0), 0.3)
        return features - self.average.detach()

    def frozen_parameter_data(self, features: Tensor) -> Tensor:
        self.average.data.mul_(0.7).add_(features.detach().mean(dim=0), alpha=0.3)
        return features - self.average.detach()

    def frozen_parameter_assigned(self, features: Tensor) -> Tensor:
        self.average.data = 0.7 * self.average.data + 0.3 * features.detach().mean(dim=0)
        return features - self.average.detach()

    def hidden_state(self, features: Tensor) -> Tensor:
        self.hidden = 0.5 * self.hidden.to(features) + features.detach().mean(dim=0)
        return features + self.hidden

    def hidden_in_place(self, features: Tensor) -> Tensor:
        if self.hidden.device != features.device:
            self.hidden = self.hidden.to(features)
        self.hidden.mul_(0.5).add_(features.detach().mean(dim=0))
        return features + self.hidden

    def counter(self, features: Tensor) -> Tensor:
        self.calls += 1
        return torch.tensor(1 + 0.3 * (self.calls % 3))

    def memory(self, features: Tensor) -> Tensor:
        self.queue.append(features.detach().mean())
        return features - torch.stack(self.queue[-4:]).mean()

    def dictionary(self, features: Tensor) -> Tensor:
        self.table["scale"] = 1.2 if self.table["scale"] == 1.0 else 1.0
        return torch.tensor(self.table["scale"])

    def cached(self, features: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.first = features.detach().mean(dim=0)
        return features - self.first

    def generator(self, features: Tensor) -> Tensor:
        return features + 0.3 * torch.randn(4, generator=self.noise)

    def python_generator(self, features: Tensor) -> Tensor:
        return torch.tensor(1 + 0.3 * self.python.random())

    def numpy_generator(self, features: Tensor) -> Tensor:
        return torch.tensor(1 + 0.3 * self.numpy.random(), dtype=torch.float32)

    def global_generators(self, features: Tensor) -> Tensor:
        return features + torch.randn(4) + random.random() + np.random.rand()  # noqa: NPY002

    def before_batch_in_place(self, batch: Any) -> None:
        batch["x"].mul_(1.3)

    def before_batch_entry(self, batch: Any) -> None:
        batch["x"] = batch["x"] * 1.3


REPEATABLE = [
    "buffer",
    "late_buffer",
    "frozen_parameter",
    "frozen_parameter_data",
    "frozen_parameter_assigned",
    "hidden_state",
    "hidden_in_place",
    "counter",
    "memory",
    "dictionary",
    "cached",
    "generator",
    "python_generator",
    "numpy_generator",
    "global_generators",
    "batch_in_place",
    "batch_entry",
    "pop",
    "missing",
    "left out",
]
