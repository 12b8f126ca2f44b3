"""What the ranks of the DDP tests run; in a module of its own, which they import."""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.nn.functional import all_reduce
from torchjd.aggregation import UPGrad

from lightning_cost import ConflictMonitor, SymmetryTeleportCallback, TaskGradients
from lightning_cost._training.engine import Engine
from lightning_cost.objectives import ConflictAlignment, RandomDirection
from lightning_cost.surface import Point, Surface
from tests.support.nets import Batch, Net, fit, make_batches, make_mlp, make_trainer
from tests.support.teleporting import SaveAt, StatefulBatches, teleporter

STEPS = 20
SIZE = 16
EVERY_FIFTH_STEP = partial(teleporter, check_every_n_steps=5)
ADAM = partial(torch.optim.Adam, lr=1e-2)


class SyncNorm(nn.Module):
    """Batch normalization with the statistics of all ranks: torch's own runs on GPUs only."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        mean = _mean_over_ranks(x.mean(dim=0))
        variance = _mean_over_ranks((x - mean).square().mean(dim=0))
        self.running_mean.lerp_(mean.detach(), 0.1)
        return (x - mean) / (variance + 1e-5).sqrt() * self.weight + self.bias


def _mean_over_ranks(value: Tensor) -> Tensor:
    return all_reduce(value) / dist.get_world_size() if dist.is_initialized() else value


class NormNet(Net):
    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        first = make_mlp(5, 6)
        # Before the normalization its gradient is zero but for rounding, which Adam would blow up.
        first[0].bias = None
        self.backbone = nn.Sequential(first, SyncNorm(6), nn.Tanh(), make_mlp(6, 4))


def none() -> None:
    return None


@dataclass
class Run:
    """One training run; on several ranks, each takes its part of every batch."""

    method: Callable[[], Any] = lambda: None
    net: Callable[[Any], Any] = Net
    callback: Callable[[], SymmetryTeleportCallback | None] = EVERY_FIFTH_STEP
    strategy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = ADAM
    attributes: dict[str, Any] = field(default_factory=dict)
    plugins: Callable[[], list[Any]] = list


def parts(batches: list[Batch], rank: int, size: int) -> list[Batch]:
    return [{name: value.chunk(size)[rank] for name, value in batch.items()} for batch in batches]


def train(rank: int, run: Run, size: int = 2, ckpt_path: Any = None) -> dict[str, Any]:
    """Train; returns parameters, buffers and reports."""
    torch.manual_seed(0)
    callback = run.callback()
    module = run.net(run.method())
    module.make_optimizer = run.optimizer
    for name, value in run.attributes.items():
        setattr(module, name, value)
    settings: dict[str, Any] = {"callbacks": [] if callback is None else [callback], **run.trainer}
    settings["plugins"] = run.plugins()
    if size > 1:
        settings |= {"strategy": DDPStrategy(**run.strategy), "devices": size, "use_distributed_sampler": False}
        # Random numbers that differ between the ranks, as those of dropout do.
        torch.manual_seed(rank)
    trainer = fit(module, parts(make_batches(STEPS, size=SIZE), rank, size), ckpt_path=ckpt_path, **settings)
    reports = [] if callback is None else callback.reports
    return {
        "parameters": {name: value.detach() for name, value in module.named_parameters()},
        "buffers": dict(module.named_buffers()),
        "reports": [{**asdict(report), "seconds": None, "trace": None} for report in reports],
        "rates": Engine(module).state_dict()["rates"],
        "steps": trainer.global_step,
    }


def watched(rank: int, size: int = 2) -> tuple[dict[str, float], int]:
    """What a monitor has measured, flat, and how many lines it has printed."""
    monitor, printed = ConflictMonitor(every_n_steps=3), io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(rank, Run(callback=none, trainer={"callbacks": [monitor]}), size)
    return {"/".join(key): mean.value for key, mean in monitor._sums.means.items()}, len(
        printed.getvalue().splitlines()
    )


def warned(rank: int, run: Run) -> list[str]:
    """What a run warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(rank, run)
    return [str(warning.message) for warning in caught]


def alone(run: Run) -> dict[str, Any]:
    """The same on one process with whole batches."""
    return train(0, run, size=1)


# ------------------------------------------------------------------------------------------------------ odd modules


class BranchNet(Net):
    """One part of the backbone is used by the first task on the second rank only, and one is never used."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.backbone = nn.ModuleDict({"main": make_mlp(5, 4), "branch": make_mlp(5, 4), "idle": make_mlp(5, 4)})

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        features = self.backbone["main"](batch["x"])
        losses = self.losses(batch, features.tanh())
        if dist.get_rank() == 1:
            branch = self.backbone["branch"](batch["x"]).tanh()
            losses["left"] = losses["left"] + (self.heads["left"](branch) - batch["left"]).square().mean()
        return losses


class BatchNet(Net):
    """Its random numbers follow from the batch on the first rank, and are others on the second."""

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        if not self.replaying:
            torch.manual_seed(2 * batch_idx + (dist.get_rank() if dist.is_initialized() else 0))
        return super().task_losses(batch, batch_idx)


class FailingNet(Net):
    """Fails on the second rank at the n-th evaluation of the losses in a teleport."""

    at = 1

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.evaluations = itertools.count(1)

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        if self.replaying and next(self.evaluations) == self.at and dist.get_rank() == 1:
            raise ArithmeticError("a fault on one rank")
        return super().task_losses(batch, batch_idx)


def train_until_fault(rank: int, at: int, method: Callable[[], Any] = UPGrad) -> dict[str, Any]:
    """The error of a fit that fails within a teleport, and whether the parameters are those before it."""
    module, callback = FailingNet(method()), teleporter(check_every_n_steps=5)
    module.at = at
    before: list[dict[str, Tensor]] = []

    class Before(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            before.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})

    try:
        fit(
            module,
            parts(make_batches(STEPS, size=SIZE), rank, 2),
            strategy="ddp",
            devices=2,
            use_distributed_sampler=False,
            callbacks=[Before(), callback],
        )
    except (ArithmeticError, RuntimeError) as error:
        same = all(torch.equal(value, before[-1][name]) for name, value in module.named_parameters())
        return {"error": repr(error), "same": same, "reason": callback.reports[-1].reason}
    return {}


# ------------------------------------------------------------------------------------------ what differs between ranks


def fires_on_second_rank_only(gradients: TaskGradients) -> bool:
    return dist.get_rank() == 1


def fires_on_first_rank_only(gradients: TaskGradients) -> bool:
    return dist.get_rank() == 0


class ChecksOnFirstRank(SymmetryTeleportCallback):
    def should_check(self, trainer: L.Trainer, pl_module: Any) -> bool:
        return dist.get_rank() == 0 and trainer.global_step % 5 == 0


class Compressing(L.Callback):
    """Registers the hook itself: Lightning's ``ddp_comm_hook`` works on GPUs only."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(None, bf16_compress_hook)


class FrozenHeads(Net):
    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.heads.requires_grad_(False)


class OrderNet(Net):
    """The second rank returns its tasks in another order."""

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        losses = super().task_losses(batch, batch_idx)
        if dist.is_initialized() and dist.get_rank() == 1:
            return dict(reversed(losses.items()))
        return losses


class MissingNet(Net):
    """In every other batch the second rank has no labels of one task; a single process counts zero for them."""

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        losses: dict[str, Tensor | None] = {**super().task_losses(batch, batch_idx)}
        if batch_idx % 2 == 0:
            if not dist.is_initialized():
                # From the same features: each has one gradient of every task.
                features = self.features(batch)
                first_half = {name: value.chunk(2)[0] for name, value in batch.items()}
                losses = {**self.losses(batch, features)}
                losses["ink"] = self.losses(first_half, features.chunk(2)[0])["ink"] / 2
            elif dist.get_rank() == 1:
                losses["ink"] = None
        return losses


class LateNet(Net):
    """Returns a task that no rank had in the first batch."""

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        losses = super().task_losses(batch, batch_idx)
        return losses if batch_idx == 0 else losses | {"new": losses["left"]}


class IdleNet(Net):
    """In every other batch the second rank has no labels at all."""

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {} if batch_idx % 2 and dist.get_rank() == 1 else super().task_losses(batch, batch_idx)


class RankValue(ConflictAlignment):
    """Lets one rank accept what the other refuses."""

    def value(self, surface: Surface, point: Point) -> float:
        return super().value(surface, point) * (1 if dist.get_rank() == 0 else -1)


class RankDirection(RandomDirection):
    """Leads the ranks apart."""

    def value_and_gradient(self, surface: Surface, point: Point) -> tuple[None, Tensor]:
        _, direction = super().value_and_gradient(surface, point)
        return None, direction * (1.0 if dist.get_rank() == 0 else -1.0)


def scaler_plugins() -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]


def resumed(rank: int, path: Any, method: Callable[[], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run with teleports, and one that goes on from its checkpoint after seven steps."""
    callback = partial(teleporter, check_every_n_steps=2)
    outcomes = []
    for ckpt_path in (None, path):
        teleports, module = callback(), Net(method())
        module.make_optimizer = partial(torch.optim.Adam, lr=1e-2)
        loader = StatefulBatches(parts(make_batches(STEPS, size=SIZE), rank, 2))
        trainer = make_trainer(
            strategy="ddp", devices=2, use_distributed_sampler=False, callbacks=[teleports, SaveAt(path, 7)]
        )
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        reports = [{**asdict(report), "seconds": None, "trace": None} for report in teleports.reports]
        outcomes.append({"parameters": {n: p.detach() for n, p in module.named_parameters()}, "reports": reports})
    return outcomes[0], outcomes[1]
