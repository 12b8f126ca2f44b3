"""What a step of the dense QM9 network costs, as a ratio to the same network in torch_geometric's layers.

A forward pass and the gradients of 11 task losses, of a batch of real molecules, on one thread of the CPU. The two take
turns within one process; the figure is the ratio of medians.

Run `python -m benchmarks.qm9`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor, nn

from recipes.qm9.data import QM9DataModule
from recipes.qm9.network import MoleculeNet
from recipes.qm9.reference import GeometricNet, as_one_graph

_TASKS = 11


def step(heads: nn.Module, network: nn.Module, features: Tensor) -> list[dict[str, Tensor]]:
    """The gradient of each task, by the names of the parameters."""
    losses = heads(features).pow(2).mean(dim=0)
    named = dict(network.named_parameters())
    rows = (torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses)
    return [dict(zip(named, row, strict=True)) for row in rows]


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    """Parse arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--edge-hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="molecules; torch_geometric takes 0.4 GB for 32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = QM9DataModule(batch_size=options.batch)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    inputs = {name: batch[name] for name in ("elements", "bonds", "positions", "mask")}
    graph = as_one_graph(**inputs)
    dense, heads = MoleculeNet(options.width, options.edge_hidden), nn.Linear(options.width, _TASKS)
    geometric = GeometricNet(dense)

    def ours() -> list[dict[str, Tensor]]:
        return step(heads, dense, dense(**inputs))

    def theirs() -> list[dict[str, Tensor]]:
        return step(heads, geometric, geometric(*graph))

    error = max(
        float((found[GeometricNet.names[name]] - expected).norm() / expected.norm())
        for found, wanted in zip(ours(), theirs(), strict=True)
        for name, expected in wanted.items()
    )
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(options.rounds)]
    dense_seconds, geometric_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    Console(width=120).print(
        f"width {options.width}, batch {options.batch}, {_TASKS} task gradients: torch_geometric takes"
        f" {geometric_seconds / dense_seconds:.1f} times as long (dense step {dense_seconds * 1e3:.0f} ms);"
        f" a gradient of a parameter differs by at most {error:.0e} of its norm.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
