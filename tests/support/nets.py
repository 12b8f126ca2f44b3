"""Small modules, batches and Trainers that the tests share."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cost import MultiTaskMixin

Batch = dict[str, Tensor]

TASKS = ("left", "right", "ink")


def make_trainer(**settings: Any) -> L.Trainer:
    """A Trainer on the CPU, for one epoch unless told otherwise, that prints and writes nothing."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**defaults, **settings})


def fit(module: L.LightningModule, batches: Iterable[Any], ckpt_path: Any = None, **settings: Any) -> L.Trainer:
    """Train on ready-made batches in their order; ``settings`` are those of the Trainer."""
    trainer = make_trainer(**settings)
    trainer.fit(module, DataLoader(list(batches), batch_size=None), ckpt_path=ckpt_path)
    return trainer


def make_batches(count: int, tasks: Sequence[str] = TASKS, size: int = 8, seed: int = 0) -> list[Batch]:
    """Regression batches of 5 standard normal inputs ``x`` and one target a task."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(size, 5, generator=generator)}
        | {task: torch.randn(size, 1, generator=generator) for task in tasks}
        for _ in range(count)
    ]


def make_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Seeds(L.Callback):
    """The random numbers of a batch follow from its index: no checkpoint of Lightning's holds their state."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)


class PlainNet(L.LightningModule):
    """A shared backbone and a linear head a task, trained on the mean of the losses without the mixin."""

    def __init__(self, tasks: Sequence[str] = TASKS, scales: Sequence[float] | None = None) -> None:
        super().__init__()
        self.backbone: nn.Module = make_mlp(5, 6, 4)
        self.heads = nn.ModuleDict({task: make_mlp(4, 1) for task in tasks})
        self.scales = dict(zip(tasks, scales or [1.0] * len(tasks), strict=True))
        self.make_optimizer: Callable[[Any], Any] = partial(torch.optim.SGD, lr=0.05)

    def features(self, batch: Batch) -> Tensor:
        return self.backbone(batch["x"]).tanh()

    def losses(self, batch: Batch, features: Tensor | None = None) -> dict[str, Tensor]:
        features = self.features(batch) if features is None else features
        return {
            task: self.scales[task] * (head(features) - batch[task]).square().mean()
            for task, head in self.heads.items()
        }

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return torch.stack(list(self.losses(batch).values())).mean()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Net(MultiTaskMixin, PlainNet):
    """The same with the mixin."""

    def __init__(
        self, mtl_method: Any = None, tasks: Sequence[str] = TASKS, scales: Sequence[float] | None = None
    ) -> None:
        super().__init__(tasks, scales)
        self.mtl_method = mtl_method

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self.losses(batch)


def assert_same_parameters(module: nn.Module, reference: nn.Module, atol: float = 0.0) -> None:
    """Compare parameters by name, bit for bit unless told otherwise."""
    expected = dict(reference.named_parameters())
    actual = {name: parameter for name, parameter in module.named_parameters() if name in expected}
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        torch.testing.assert_close(
            parameter, expected[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_moved(module: nn.Module) -> None:
    """Every parameter of a trained module differs from that of a new one."""
    for name, parameter in type(module)().named_parameters():
        assert not torch.equal(parameter, module.get_parameter(name)), name


def values_of(module: nn.Module) -> Tensor:
    """The parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def grads_of(module: nn.Module) -> list[Tensor]:
    """Copies of the gradients that there are."""
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
