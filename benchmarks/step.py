"""What a training step costs by how the tasks are combined, as a ratio to a plain Lightning step of the summed loss.

The variants take turns within one process, a few steps each, so that a machine that slows down slows all of them.
Figures are ratios of the medians over rounds of the mean time of a step. Peak memory is that of a fresh process for
each variant. TorchJD's rows are the loops of its documentation, with manual optimization.

Run `python -m benchmarks.step`, or on a GPU `python -m benchmarks.step --device cuda --network segnet-mtan`.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchjd.aggregation import UPGrad, UPGradWeighting
from torchjd.autogram import Engine
from torchjd.autojac import jac_to_grad, mtl_backward

from benchmarks.networks import NETWORKS, Images, Network
from lightning_cost import DominatedConflict, MultiTaskMixin, SymmetryTeleportCallback, TaskGradients
from lightning_cost.triggers import dominated_conflict


class Base(L.LightningModule):
    """A network, its losses, and the time of its steps."""

    def __init__(self, network: Network, num_tasks: int) -> None:
        super().__init__()
        self.network = network.make(num_tasks)
        # All of the same sign: the rows without teleports are to meet no conflict.
        self.register_buffer("targets", torch.linspace(2, 4, num_tasks))
        self.seconds: list[float] = []

    def losses(self, images: Tensor) -> list[Tensor]:
        predictions = self.network(images)
        return [
            (prediction - target).square().mean() for prediction, target in zip(predictions, self.targets, strict=True)
        ]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-5)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._began = self._now()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(self._now() - self._began)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Plain(Base):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.stack(self.losses(batch)).sum()


class Mixin(MultiTaskMixin, Base):
    shared_module = "network.shared"

    def task_losses(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return {str(index): loss for index, loss in enumerate(self.losses(batch))}


class Manual(Base):
    """TorchJD's documented loop in Lightning."""

    def __init__(self, network: Network, num_tasks: int) -> None:
        super().__init__(network, num_tasks)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.differentiate(batch)
        optimizer.step()
        optimizer.zero_grad()


class MtlBackward(Manual):
    def differentiate(self, batch: Tensor) -> None:
        features = self.network.shared(batch)
        losses = [
            (head(features) - target).square().mean()
            for head, target in zip(self.network.heads, self.targets, strict=True)
        ]
        mtl_backward(losses, features=features, parallel_chunk_size=1)
        jac_to_grad(self.network.shared.parameters(), UPGrad())


class Autogram(Manual):
    """TorchJD's engine, which does not allow running statistics in BatchNorm; these are left out here."""

    def __init__(self, network: Network, num_tasks: int) -> None:
        super().__init__(network, num_tasks)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        self.engine = Engine(self.network.shared, batch_dim=None)
        self.weighting = UPGradWeighting()

    def differentiate(self, batch: Tensor) -> None:
        losses = torch.stack(self.losses(batch))
        losses.backward(self.weighting(self.engine.compute_gramian(losses)))


def _judged(gradients: TaskGradients) -> bool:
    dominated_conflict(gradients)
    return False


class _JudgedLazily(DominatedConflict):
    def __call__(self, gradients: TaskGradients) -> bool:
        return _judged(gradients)


@dataclass(frozen=True)
class Variant:
    """One row: a module, attributes of it, a callback, and the least number of steps that is typical."""

    make: type[Base]
    attributes: Callable[[], dict[str, Any]] = dict
    callback: Callable[[], L.Callback | None] = lambda: None
    steps: int = 1


checked = partial(SymmetryTeleportCallback, start_epoch=0)
VARIANTS = {
    "plain": Variant(Plain),
    "TorchJD, mtl_backward, UPGrad": Variant(MtlBackward),
    "TorchJD, autogram, UPGrad": Variant(Autogram),
    "UPGrad": Variant(Mixin, lambda: {"mtl_method": UPGrad()}),
    "UPGrad, weights_every=10": Variant(Mixin, lambda: {"mtl_method": UPGrad(), "weights_every": 10}, steps=10),
    "UPGrad of features": Variant(Mixin, lambda: {"mtl_method": UPGrad(), "task_gradients_of": "features"}),
    "mean": Variant(Mixin),
    "mean, a check at every step": Variant(Mixin, callback=lambda: checked(trigger=_judged)),
    "mean, a lazy check at every step": Variant(
        Mixin, callback=lambda: checked(trigger=_JudgedLazily(all_tasks_every=50)), steps=50
    ),
}


class Measured:
    """A variant with its module, which is trained again and again."""

    def __init__(self, name: str, network: Network, num_tasks: int, device: str) -> None:
        torch.manual_seed(0)
        self.variant = VARIANTS[name]
        self.network = network
        self.device = device
        self.module = self.variant.make(network, num_tasks)
        for attribute, value in self.variant.attributes().items():
            setattr(self.module, attribute, value)

    def train(self, num_steps: int) -> float:
        """Mean seconds of a step, without the first, which allocates."""
        callback = self.variant.callback()
        self.module.seconds = []
        trainer = bare_trainer(self.device, max_epochs=1, callbacks=[] if callback is None else [callback])
        images = Images(self.network, 1 + max(num_steps, self.variant.steps))
        trainer.fit(self.module, torch.utils.data.DataLoader(images, batch_size=None))
        return statistics.mean(self.module.seconds[1:])


def bare_trainer(device: str = "cpu", **settings: Any) -> L.Trainer:
    """A Trainer that does nothing but train."""
    defaults = {
        "accelerator": "gpu" if device == "cuda" else device,
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**defaults, **settings})


def quiet(threads: int) -> None:
    """Take so many threads, and leave out what Lightning says of every Trainer."""
    torch.set_num_threads(threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def peak_memory(name: str, network: str, num_tasks: int, device: str, threads: int) -> float:
    """Peak memory in MiB after four steps: of the GPU, or resident memory of this process (Linux only)."""
    quiet(threads)
    measured = Measured(name, NETWORKS[network], num_tasks, device)
    measured.train(3)
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Not `getrusage`: its maximum is inherited from the process that started this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(arguments: argparse.Namespace, num_tasks: int) -> dict[str, tuple[float, float] | str]:
    """By variant its seconds a step and its peak memory, or why it cannot run."""
    variants: dict[str, Measured] = {}
    failures: dict[str, str] = {}
    for name in arguments.variants:
        try:
            variants[name] = Measured(name, NETWORKS[arguments.network], num_tasks, arguments.device)
            variants[name].train(2)
        except Exception as error:
            variants.pop(name, None)
            failures[name] = f"{type(error).__name__}: {error}"
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, measured in variants.items():
            seconds[name].append(measured.train(arguments.steps))
    results: dict[str, tuple[float, float] | str] = dict(failures)
    for name in variants:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            memory = executor.submit(
                peak_memory, name, arguments.network, num_tasks, arguments.device, arguments.threads
            ).result()
        results[name] = statistics.median(seconds[name]), memory
    return results


def table_of(arguments: argparse.Namespace, results: dict[int, dict[str, tuple[float, float] | str]]) -> Table:
    """A row a variant, and two columns a number of tasks: time and memory, as ratios to the plain step."""
    network = NETWORKS[arguments.network]
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    table = Table(title=f"{arguments.network}, batch {network.batch_size}, {where}: time (memory) over those of plain")
    table.add_column("step")
    for num_tasks in results:
        table.add_column(f"K = {num_tasks}", justify="right")
    for name in arguments.variants:
        cells = []
        for figures in results.values():
            plain, own = figures["plain"], figures[name]
            if isinstance(own, str) or isinstance(plain, str):
                cells.append("cannot run")
            elif name == "plain":
                cells.append(f"{own[0] * 1e3:.0f} ms ({own[1]:.0f} MiB)")
            else:
                cells.append(f"{own[0] / plain[0]:.2f} ({own[1] / plain[1]:.2f})")
        table.add_row(name, *cells)
    return table


def main() -> None:
    """Parse arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 3, 8, 40])
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a variant in a round, at least")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.variants = list(dict.fromkeys(["plain", *arguments.variants]))
    quiet(arguments.threads)
    console = Console(width=160)
    results = {}
    for num_tasks in arguments.tasks:
        # With many tasks this takes minutes.
        results[num_tasks] = measure(arguments, num_tasks)
        console.print(table_of(arguments, results))
    for num_tasks, figures in results.items():
        for name, figure in figures.items():
            if isinstance(figure, str):
                console.print(f"{name}, K = {num_tasks}, cannot run: {figure}", highlight=False)


if __name__ == "__main__":
    main()
