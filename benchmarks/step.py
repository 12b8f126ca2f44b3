"""What a training step with task gradients costs, as a ratio to a plain Lightning step of the summed loss.

ResNet-18 for 32 x 32 images, batch 16, UPGrad, on the CPU. The variants take turns within one process, a few steps
each, so that a machine that slows down slows all of them; figures are ratios of medians. Peak memory is that of a fresh
process for each variant.

- `plain`: Lightning, one backward pass of the summed loss.
- `mixin`: `MultiTaskMixin` with UPGrad.
- `torchjd`: the Lightning loop of TorchJD's documentation (manual optimization, `mtl_backward`, `jac_to_grad`), one
  task at a time.

Run `python -m benchmarks.step`.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchjd.aggregation import UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward
from torchvision.models import resnet18

from lightning_cost import MultiTaskMixin

BATCH_SIZE = 16
VARIANTS = ("plain", "mixin", "torchjd")


def _backbone() -> nn.Module:
    backbone = resnet18()
    backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    backbone.fc = nn.Identity()
    return backbone


class Base(L.LightningModule):
    """A ResNet-18 with one linear head a task, and the time of its steps."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.backbone = _backbone()
        self.heads = nn.ModuleList(nn.Linear(512, 1) for _ in range(num_tasks))
        self.register_buffer("targets", torch.linspace(-1, 1, num_tasks))
        self.seconds: list[float] = []

    def losses(self, features: Tensor) -> list[Tensor]:
        return [
            (head(features) - target).square().mean() for head, target in zip(self.heads, self.targets, strict=True)
        ]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(time.perf_counter() - self._began)


class Plain(Base):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.stack(self.losses(self.backbone(batch))).sum()


class Mixin(MultiTaskMixin, Base):
    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.mtl_method = UPGrad()

    def task_losses(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return {str(index): loss for index, loss in enumerate(self.losses(self.backbone(batch)))}


class TorchJD(Base):
    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.automatic_optimization = False
        self.aggregator = UPGrad()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        features = self.backbone(batch)
        mtl_backward(self.losses(features), features=features, parallel_chunk_size=1)
        jac_to_grad(self.backbone.parameters(), self.aggregator)
        optimizer.step()
        optimizer.zero_grad()


MODELS: dict[str, type[Base]] = {"plain": Plain, "mixin": Mixin, "torchjd": TorchJD}


class Images(torch.utils.data.IterableDataset[Tensor]):
    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[Tensor]:
        batch = torch.randn(BATCH_SIZE, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return iter([batch] * self.num_batches)


def train(model: Base, num_steps: int) -> list[float]:
    """Seconds of each step but the first, which allocates."""
    model.seconds = []
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(model, torch.utils.data.DataLoader(Images(num_steps), batch_size=None))
    return model.seconds[1:]


def bare_trainer(**settings: Any) -> L.Trainer:
    """A Trainer on the CPU that does nothing but train."""
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def quiet(threads: int) -> None:
    """Take so many threads, and leave out what Lightning says of every Trainer."""
    torch.set_num_threads(threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def peak_memory(variant: str, num_tasks: int, threads: int) -> float:
    """Peak resident memory of this process in MiB, after three steps of a variant; Linux only."""
    quiet(threads)
    train(MODELS[variant](num_tasks), 3)
    # Not `getrusage`: its maximum is inherited from the process that started this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Parse arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a variant in a round")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    quiet(arguments.threads)
    table = Table(title=f"ResNet-18, batch {BATCH_SIZE}, UPGrad, CPU, {arguments.threads} threads")
    for heading in ("tasks", "plain step", "mixin / plain", "TorchJD / plain", "mixin / TorchJD", "peak MiB"):
        table.add_column(heading, justify="right")
    for num_tasks in arguments.tasks:
        models = {variant: MODELS[variant](num_tasks) for variant in VARIANTS}
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for _ in range(arguments.rounds):
            for variant, model in models.items():
                seconds[variant] += train(model, 1 + arguments.steps)
        median = {variant: statistics.median(values) for variant, values in seconds.items()}
        memory = {}
        for variant in VARIANTS:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as executor:
                memory[variant] = executor.submit(peak_memory, variant, num_tasks, arguments.threads).result()
        table.add_row(
            str(num_tasks),
            f"{median['plain'] * 1e3:.0f} ms",
            f"{median['mixin'] / median['plain']:.2f}",
            f"{median['torchjd'] / median['plain']:.2f}",
            f"{median['mixin'] / median['torchjd']:.2f}",
            " / ".join(f"{variant} {memory[variant]:.0f}" for variant in VARIANTS),
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
