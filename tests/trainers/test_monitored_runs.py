"""A run with a ConflictMonitor is the run without it, bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchjd.aggregation import CAGrad, PCGrad, UPGrad
from torchjd.scalarization import FAMO, Random

from lightning_cost import ConflictMonitor, DominatedConflict, ScaleInvariant, SymmetryTeleportCallback
from tests.support.ddp_runs import scaler_plugins
from tests.support.nets import Batch, Net, assert_same_parameters, fit, make_batches, make_mlp
from tests.support.teleporting import teleporter

pytestmark = pytest.mark.slow

SCALES = (1.0, 5.0, 0.1)
quiet = partial(ConflictMonitor, table=False)


class Noisy(Net):
    """Draws random numbers in its forward pass, and its second task often has no labels."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method, scales=SCALES)
        self.backbone = nn.Sequential(make_mlp(5, 6), nn.Dropout(0.3), nn.BatchNorm1d(6), nn.Tanh(), make_mlp(6, 4))

    def task_losses(self, batch: Batch, batch_idx: int) -> Any:
        losses = self.losses(batch)
        return losses if batch_idx % 3 else {**losses, "right": None}


class Detached(Noisy):
    """The loss of one task does not reach what the tasks share."""

    def losses(self, batch: Batch, features: Tensor | None = None) -> dict[str, Tensor]:
        features = self.features(batch) if features is None else features
        return {**super().losses(batch, features), "ink": super().losses(batch, features.detach())["ink"]}


class Recomputed(Noisy):
    """Activation checkpointing evaluates BatchNorm again in every backward pass."""

    def features(self, batch: Batch) -> Tensor:
        return checkpoint(self.backbone, batch["x"], use_reentrant=False).tanh()


class Huge(Noisy):
    """Squares of its gradients overflow."""

    def losses(self, batch: Batch, features: Tensor | None = None) -> dict[str, Tensor]:
        return {name: loss * 1e22 for name, loss in super().losses(batch, features).items()}


class Mended(Noisy):
    """Gradients are infinite in a step, and it mends them itself."""

    def losses(self, batch: Batch, features: Tensor | None = None) -> dict[str, Tensor]:
        losses = super().losses(batch, features)
        # The derivative of a square root at 0.
        return {**losses, "ink": losses["ink"] + (self.backbone[0][0].weight[0, 0] * 0).sqrt()}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        for parameter in self.parameters():
            if parameter.grad is not None:
                torch.nan_to_num_(parameter.grad, 0.0, 0.0, 0.0)


class Halved(Noisy):
    """Changes the loss after the mixin."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * 0.5


class Drawing(Noisy):
    """Draws random numbers in its backward pass."""

    def features(self, batch: Batch) -> Tensor:
        features = super().features(batch)
        features.register_hook(lambda grad: grad + 0.01 * torch.randn_like(grad))
        return features


class Watching(Noisy):
    """Does something else in steps that have task gradients."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.task_gradients is not None:
            self.backbone[0][0].weight.grad.mul_(0.5)
        super().on_before_optimizer_step(optimizer)


def overflowing_scaler() -> list[Any]:
    # At this scale the gradients of single tasks overflow half precision, but their mean does not.
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**16))]


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "SI": {"method": ScaleInvariant},
    "FAMO": {"method": partial(FAMO, 3)},
    "RLW": {"method": Random},
    "UPGrad": {"method": UPGrad},
    "PCGrad": {"method": PCGrad},
    "accumulation, clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "UPGrad, accumulation": {"method": UPGrad, "accumulate_grad_batches": 2},
    "features": {"method": UPGrad, "attributes": {"task_gradients_of": "features"}},
    "weights_every": {"method": partial(CAGrad, c=0.4), "attributes": {"weights_every": 4}},
    "weights_every of UPGrad": {"method": UPGrad, "attributes": {"weights_every": 3}, "every": 1},
    "features, weights_every": {
        "method": UPGrad,
        "attributes": {"task_gradients_of": "features", "weights_every": 4},
        "accumulate_grad_batches": 2,
    },
    "teleports": {"callback": partial(teleporter, trigger="any", check_every_n_steps=2)},
    "rare teleports": {"callback": partial(teleporter, trigger="weak", check_every_n_steps=4), "every": 1},
    "lazy teleports": {
        "callback": partial(teleporter, trigger=DominatedConflict(), check_every_n_steps=2),
        "every": 1,
    },
    "lazy deferred teleports": {
        "callback": partial(teleporter, trigger=DominatedConflict(), reevaluate=False),
        "every": 1,
        "accumulate_grad_batches": 2,
    },
    "deferred teleports": {"callback": partial(teleporter, trigger="any", check_every_n_steps=2, reevaluate=False)},
    "scaler": {"plugins": scaler_plugins},
    "scaler of overflowing rows": {"plugins": overflowing_scaler, "every": 1},
    "a detached head": {"module": Detached, "every": 1},
    "activation checkpointing": {"module": Recomputed, "every": 1},
    "squares that overflow": {"module": Huge, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "gradients that the module mends": {"module": Mended, "every": 1},
    "a loss that is changed": {"module": Halved, "every": 1},
    "random numbers in backward": {"module": Drawing, "every": 1},
    "a module that looks for task gradients": {"module": Watching, "every": 1},
}
# None of their steps can be measured.
UNMEASURED = {"squares that overflow", "gradients that the module mends"}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_with_it_is_the_run_without_it(name: str) -> None:
    settings = dict(CONFIGURATIONS[name])
    make_module, every = settings.pop("module", Noisy), settings.pop("every", 3)
    method, attributes = settings.pop("method", lambda: None), settings.pop("attributes", {})
    make_callback, plugins = settings.pop("callback", lambda: None), settings.pop("plugins", None)
    runs = []
    for monitor in (None, quiet(every_n_steps=every)):
        torch.manual_seed(0)
        module = make_module(method())
        module.make_optimizer = partial(torch.optim.AdamW, lr=1e-2)
        for attribute, value in attributes.items():
            setattr(module, attribute, value)
        cost = make_callback()
        callbacks = [callback for callback in (monitor, cost) if callback is not None]
        if plugins is not None:
            settings["plugins"] = plugins()
        trainer = fit(module, make_batches(20), callbacks=callbacks, **settings)
        runs.append((module, cost, trainer, torch.rand(3)))
    (without, first, before, drawn), (module, second, after, drawn_too) = runs
    assert_same_parameters(module, without)
    for key, buffer in without.named_buffers():
        torch.testing.assert_close(module.get_buffer(key), buffer, rtol=0, atol=0, msg=key)
    assert torch.equal(drawn, drawn_too)
    assert monitor is not None
    due = len(range(0, after.global_step, every))
    assert monitor.summary.steps + monitor.summary.skipped == due
    assert (monitor.summary.steps == 0) == (name in UNMEASURED)
    if isinstance(first, SymmetryTeleportCallback) and isinstance(second, SymmetryTeleportCallback):
        assert sum(report.accepted for report in first.reports) > 0
        assert [report.step for report in second.reports] == [report.step for report in first.reports]
    for (key, value), other in zip(before.callback_metrics.items(), after.callback_metrics.values(), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=0, msg=key, equal_nan=True)


def test_reentrant_checkpointing_is_refused_with_its_cause() -> None:
    class Hidden(Noisy):
        def features(self, batch: Batch) -> Tensor:
            return checkpoint(self.backbone, batch["x"].requires_grad_(), use_reentrant=True).tanh()

    with pytest.raises(RuntimeError, match=r"reentrant activation checkpointing.*use_reentrant=False"):
        fit(Hidden(), make_batches(2), callbacks=[quiet()])
