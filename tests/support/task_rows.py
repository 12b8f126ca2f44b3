"""Modules that differentiate each task loss themselves, to compare the rows of the task gradients with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchjd.aggregation import UPGrad
from torchjd.scalarization import UW, Constant

from lightning_cost import MultiTaskMixin
from lightning_cost._training.shared import trained_parameters
from tests.support.nets import Net, make_batches, make_mlp


class Watched(MultiTaskMixin):
    """Differentiates every task loss on the graph of the step, and keeps these rows and those of the mixin."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.expected, self.actual = [], []
        self.sum = 0

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        self.by_task = super().task_losses(batch, batch_idx)
        return self.by_task

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        (shared, _), rows = trained_parameters(self), []
        for task_loss in self.by_task.values():
            pieces = torch.autograd.grad(task_loss, shared, retain_graph=True, allow_unused=True)
            pieces = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(shared, pieces, strict=True)]
            rows.append(torch.cat([piece.flatten() for piece in pieces]))
        self.sum = self.sum + torch.stack(rows) / self.trainer.accumulate_grad_batches
        super().backward(loss, *args, **kwargs)
        if self.task_gradients is None:
            self.sum = 0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert self.task_gradients is not None
        self.expected.append(self.sum)
        self.actual.append(self.task_gradients.matrix.clone())
        self.sum = 0
        super().on_before_optimizer_step(optimizer)


class WatchedNet(Watched, Net):
    """The rows of :class:`Net`; ``request`` tells at which batches to ask for them."""

    def __init__(self, *args: Any, request: Any = lambda batch_idx: False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.request = request

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.request(batch_idx):
            self.request_task_gradients()


def assert_rows(module: Any, steps: int, rtol: float = 1e-5) -> None:
    """Every row of every step, relative to its own length; zero rows exactly."""
    assert len(module.actual) == len(module.expected) == steps
    for actual, expected in zip(module.actual, module.expected, strict=True):
        assert actual.shape == expected.shape
        error, length = (actual - expected).norm(dim=1), expected.norm(dim=1)
        assert (error <= rtol * length).all(), (error / length).tolist()


METHODS = {
    "aggregator": lambda num_tasks: UPGrad(),
    "mean": lambda num_tasks: None,
    "constant": lambda num_tasks: Constant(torch.arange(1.0, 1 + num_tasks)),
    "learned": UW,
}


class SwingingNet(WatchedNet):
    """Multiplies the loss of the first task by ``swing`` at every other batch."""

    swing = 1.0

    def losses(self, batch: Any, features: Tensor | None = None) -> dict[str, Tensor]:
        losses = super().losses(batch, features)
        return losses | {"left": losses["left"] * self.swing} if batch["odd"] else losses


def swinging_batches(count: int, **settings: Any) -> Any:
    return [batch | {"odd": index % 2 == 1} for index, batch in enumerate(make_batches(count, **settings))]


def make_conv_net(channels: int) -> nn.Sequential:
    layers = [nn.Unflatten(1, (5, 1, 1)), nn.Upsample(8)]
    for inputs, outputs in ((5, channels), (channels, channels), (channels, channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


class BackboneNet(WatchedNet):
    """Any backbone from 5 inputs to 4 features."""

    def __init__(self, backbone: Any, shared_module: Any = "backbone") -> None:
        super().__init__(UPGrad())
        self.backbone = backbone
        self.shared_module = shared_module


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.body, self.use_reentrant = make_mlp(5, 6, 4), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)
