"""Small multi-task problems in float64, and their losses as plain functions of the shared parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Optimizer

from lightning_cost import MultiTaskMixin, TaskGradients
from lightning_cost._lightning.recording import RecordedBatch, Scene
from lightning_cost._training.engine import Engine
from lightning_cost._training.shared import shared_modules, shared_parameters
from lightning_cost.objectives import Objective
from lightning_cost.searches import SearchContext
from lightning_cost.surface import Surface

Batch = dict[str, Tensor]
LossFunction = Callable[[Tensor], Tensor]


class Problem(MultiTaskMixin, LightningModule):
    """Regression by linear heads on the squashed output of a backbone."""

    shared_module = "backbone"

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        scales: Sequence[float] = (1.0, 1.0, 1.0),
        method: Any = None,
        optimizer: Callable[[LightningModule], Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.mtl_method = method
        self.backbone = backbone
        self.heads = nn.ModuleList(nn.Linear(num_features, 1) for _ in scales)
        self.scales = list(scales)
        self.make_optimizer = optimizer or (lambda module: SGD(module.parameters(), lr=0.1))

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        output = self.backbone(batch["x"])
        features = (output[0] if isinstance(output, tuple) else output).tanh().flatten(1)
        return {
            f"task{i}": scale * (head(features)[:, 0] - batch["y"][:, i]).square().mean()
            for i, (head, scale) in enumerate(zip(self.heads, self.scales, strict=True))
        }

    def forward(self, batch: Batch) -> Tensor:
        return torch.stack(list(self.task_losses(batch, 0).values()))

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self)


def mlp_problem(num_tasks: int = 3, seed: int = 0, **kwargs: Any) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        return Problem(backbone, 4, **{"scales": [1.0] * num_tasks, **kwargs}).double()


def mlp_batch(num_tasks: int = 3, seed: int = 1, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(size, 5, generator=generator, dtype=torch.float64),
        "y": torch.randn(size, num_tasks, generator=generator, dtype=torch.float64),
    }


def conv_problem(num_tasks: int = 3, seed: int = 0, **kwargs: Any) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, stride=2))
        return Problem(backbone, 12, **{"scales": [1.0] * num_tasks, **kwargs}).double()


def conv_batch(num_tasks: int = 3, seed: int = 1, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64),
        "y": torch.randn(size, num_tasks, generator=generator, dtype=torch.float64),
    }


def trainer(**kwargs: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", **{**quiet, **kwargs})


@functools.cache
def _trainer_of_precision(precision: str) -> Trainer:
    return trainer(precision=precision)


def record(module: MultiTaskMixin, batch: Any, batch_idx: int = 0) -> RecordedBatch:
    scene = Scene(module, batch, batch_idx)
    return RecordedBatch(scene, Engine(module).evaluate(batch, batch_idx))


def surface_of(module: MultiTaskMixin, *batches: Any, seed: int = 0, precision: str = "32-true") -> Surface:
    """The surface of a module that is attached to a Trainer, as the callback makes it."""
    module.trainer = _trainer_of_precision(precision)
    engine = Engine(module)
    return Surface(
        [functools.partial(engine.replay, record(module, batch)) for batch in batches],
        shared_parameters(module),
        list(module.parameters()),
        engine.scalarize_again,
        torch.Generator().manual_seed(seed),
        engine.numerics,
    )


def flat_parameters(module: nn.Module) -> Tensor:
    """The shared parameters of a ``Problem``, concatenated without the package's own functions."""
    return torch.cat([p.detach().reshape(-1) for p in module.backbone.parameters() if p.requires_grad])


def loss_function(module: Problem, *batches: Batch) -> LossFunction:
    """The task losses, averaged over the batches, as a pure and differentiable function of the shared parameters."""
    shared = {name: p for name, p in module.named_parameters() if name.startswith("backbone.") and p.requires_grad}

    def losses(position: Tensor) -> Tensor:
        pieces = position.split([p.numel() for p in shared.values()])
        values = {name: piece.view(p.shape) for (name, p), piece in zip(shared.items(), pieces, strict=True)}
        return torch.stack([functional_call(module, values, (batch,)) for batch in batches]).mean(dim=0)

    return losses


def jacobian(losses: LossFunction, position: Tensor) -> Tensor:
    """Task gradients, shape ``(K, P)``, differentiable in the position."""
    if not position.requires_grad:
        position = position.clone().requires_grad_()
    values = losses(position)
    return torch.stack([torch.autograd.grad(value, position, create_graph=True)[0] for value in values])


def gradients_of(matrix: Tensor) -> TaskGradients:
    """Task gradients with names for their rows."""
    return TaskGradients([f"task{i}" for i in range(len(matrix))], matrix)


def rows(*values: Sequence[float]) -> TaskGradients:
    """Task gradients given number by number."""
    return gradients_of(torch.tensor(values, dtype=torch.float64))


def context_of(surface: Surface, module: Problem, objective: Objective, **kwargs: Any) -> SearchContext:
    """What a search gets at the point where a surface is."""
    start = surface.point()
    objective.begin(surface, start)
    defaults: dict[str, Any] = {
        "surface": surface,
        "start": start,
        "origin": surface.position(),
        "objective": objective,
        "invariance": "per_task",
        "modules": shared_modules(module),
        "learning_rate": 0.01,
        "record": lambda stage, **figures: None,
    }
    return SearchContext(**{**defaults, **kwargs})
