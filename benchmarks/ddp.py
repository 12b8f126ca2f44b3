"""What a step costs with two processes of DDP, as a ratio to the plain DDP step of the summed loss.

ResNet-18 for 32 x 32 images, 8 of them a process, 3 tasks, gloo on the CPU with one thread a process. The variants take
turns, an epoch of a few steps each; figures are ratios of medians.

- `plain`: Lightning's DDP, one backward pass of the summed loss.
- `UPGrad`: `MultiTaskMixin` with UPGrad.
- `UPGrad, bf16 rows`: the same with `reduce_dtype = torch.bfloat16`.
- `mean`: `MultiTaskMixin` with the mean of the losses, which needs no task gradients.
- `mean, one teleport an epoch`: the same with `SymmetryTeleportCallback`, whose check and teleport fall on the first
  step of each epoch. The median step is one without; the step with the teleport has a column of its own.

Run `python -m benchmarks.ddp`.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchjd.aggregation import UPGrad

from benchmarks.networks import NETWORKS, Images
from benchmarks.step import Base, Mixin, Plain, bare_trainer, quiet
from lightning_cost import SymmetryTeleportCallback, TaskGradients

NETWORK = NETWORKS["resnet18"]


def always(gradients: TaskGradients) -> bool:
    """Fires at every check."""
    return True


def mixin(method: Any, reduce_dtype: torch.dtype | None = None) -> Mixin:
    """The ResNet of `benchmarks.step` with a method."""
    module = Mixin(NETWORK, num_tasks=3)
    module.mtl_method = method
    module.reduce_dtype = reduce_dtype
    return module


def variants() -> dict[str, tuple[Base, Callable[[], list[L.Callback]]]]:
    """A model and its callbacks for each row of the table."""
    return {
        "plain": (Plain(NETWORK, num_tasks=3), list),
        "UPGrad": (mixin(UPGrad()), list),
        "UPGrad, bf16 rows": (mixin(UPGrad(), torch.bfloat16), list),
        "mean": (mixin(None), list),
        "mean, one teleport an epoch": (
            mixin(None),
            lambda: [SymmetryTeleportCallback(trigger=always, start_epoch=0, max_per_epoch=1)],
        ),
    }


class Share(Images):
    """Half a batch, so that two processes do the work of one of `benchmarks.step`."""

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.chunk(2)[0] for batch in super().__iter__())


def epoch(model: Base, callbacks: list[L.Callback], num_steps: int) -> list[float]:
    """Seconds of each step."""
    model.seconds = []
    trainer = bare_trainer(devices=2, strategy="ddp", max_epochs=1, callbacks=callbacks, use_distributed_sampler=False)
    trainer.fit(model, torch.utils.data.DataLoader(Share(NETWORK, num_steps), batch_size=None))
    return model.seconds


def main() -> None:
    """Parse arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="steps of a variant in a round")
    arguments = parser.parse_args()
    quiet(threads=1)
    seconds: dict[str, list[float]] = {}
    first: dict[str, list[float]] = {}
    rows = variants()
    for count in range(arguments.rounds + 1):
        for name, (model, callbacks) in rows.items():
            steps = epoch(model, callbacks(), arguments.steps)
            # The first round allocates.
            if count:
                first.setdefault(name, []).append(steps[0])
                seconds.setdefault(name, []).extend(steps[1:])
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    median = {name: statistics.median(values) for name, values in seconds.items()}
    plain = median["plain"]
    table = Table(title=f"ResNet-18, 3 tasks, 2 x 8 images, gloo on the CPU; plain DDP step {plain * 1e3:.0f} ms")
    for heading in ("variant", "step / plain", "first step of an epoch / plain"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name in seconds:
        table.add_row(name, f"{median[name] / plain:.2f}", f"{statistics.median(first[name]) / plain:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
