"""Random sequences of what users do with one module and one callback."""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from torchjd.aggregation import UPGrad

from lightning_cost import ConflictAlignment, PenaltySearch, SymmetryTeleportCallback, TaskGradients
from tests.support.nets import fit, make_batches
from tests.support.teleporting import NoisyNet, assert_same, final_state

pytestmark = pytest.mark.slow


class FragileNet(NoisyNet):
    """Fails at the n-th further evaluation of its losses in a teleport, if told so."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.make_optimizer = partial(torch.optim.Adam, lr=1e-2)
        # An object of its own: attributes are restored before each evaluation.
        self.fault = SimpleNamespace(fails_in=None)

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = super().task_losses(batch, batch_idx)
        if self.replaying and self.fault.fails_in is not None:
            self.fault.fails_in -= 1
            if self.fault.fails_in == 0:
                self.fault.fails_in = None
                raise RuntimeError("fault")
        return losses


class Switch:
    """A trigger that can be turned off."""

    def __init__(self) -> None:
        self.on = True

    def __call__(self, gradients: TaskGradients) -> bool:
        return self.on


class Stubborn(ConflictAlignment):
    """An objective that can be kept from growing, so that every teleport is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.grows = True

    def value(self, surface: Any, point: Any) -> float:
        return super().value(surface, point) if self.grows else 0.0


class Beginnings(L.Callback):
    """Keeps the parameters and buffers that each step begins with."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.state = copy.deepcopy(dict(pl_module.state_dict()))


METHODS = {"LS": None, "UPGrad": UPGrad}
SETTINGS: dict[str, dict[str, Any]] = {
    "level set": {},
    "momentum": {"history": "momentum"},
    "penalty": {"search": PenaltySearch(steps=1, lr=1e-2)},
}


class Training(RuleBasedStateMachine):
    """One module and one callback through many fits."""

    @initialize(method=st.sampled_from(sorted(METHODS)), chosen=st.sampled_from(sorted(SETTINGS)))
    def build(self, method: str, chosen: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.method, self.chosen = method, chosen
        self.seed = 0
        self.checkpoint: tuple[Path, int, int] | None = None
        self._build()
        self.num_reports = 0

    def _build(self) -> None:
        torch.manual_seed(1)
        self.module = FragileNet(METHODS[self.method]() if METHODS[self.method] else None)
        self.callback = self._callback()
        self.trainer: L.Trainer | None = None
        self.keys = list(self.module.state_dict())
        self.parameters = list(self.module.parameters())
        self.trainable = [True] * len(self.parameters)

    def _callback(self) -> SymmetryTeleportCallback:
        self.trigger, self.objective = Switch(), Stubborn()
        return SymmetryTeleportCallback(
            self.trigger, self.objective, start_epoch=0, **{"search": "level_set", **SETTINGS[self.chosen]}
        )

    def _batches(self, count: int) -> list[Any]:
        self.seed += 1
        return make_batches(count, seed=self.seed)

    @rule(count=st.integers(1, 3))
    def train(self, count: int) -> None:
        self.trainer = fit(self.module, self._batches(count), callbacks=[self.callback])
        assert self.trainer.global_step == count
        self.num_reports += count * self.trigger.on

    @rule(count=st.integers(1, 2), place=st.integers(1, 3))
    def train_with_a_fault(self, count: int, place: int) -> None:
        beginnings = Beginnings()
        self.module.fault.fails_in = place
        strikes = self.trigger.on
        if strikes:
            with pytest.raises(RuntimeError, match="fault"):
                fit(self.module, self._batches(4), callbacks=[beginnings, self.callback])
            self.num_reports = len(self.callback.reports)
            assert self.callback.reports[-1].reason == "RuntimeError: fault"
            assert_same(dict(self.module.state_dict()), beginnings.state)
            self.trainer = None
        else:
            self.train(count)
        self.module.fault.fails_in = None

    @rule(count=st.integers(1, 3))
    def train_with_refusals(self, count: int) -> None:
        """As without the callback, to the bit."""
        twin, batches = copy.deepcopy(self.module), self._batches(count)
        grows, self.objective.grows = self.objective.grows, False
        states = []
        for module, callbacks in ((self.module, [self.callback]), (twin, [])):
            torch.manual_seed(self.seed)
            trainer = fit(module, batches, callbacks=callbacks)
            states.append({**final_state(module, trainer), "random": torch.get_rng_state()})
            self.trainer = trainer if module is self.module else self.trainer
        self.objective.grows = grows
        self.num_reports += count * self.trigger.on
        assert not any(
            report.accepted for report in self.callback.reports[self.num_reports - count * self.trigger.on :]
        )
        assert_same(*states)

    @rule()
    def toggle_trigger(self) -> None:
        self.trigger.on = not self.trigger.on

    @rule(layer=st.sampled_from(["backbone.0", "backbone.4", "heads.left"]))
    def toggle_requires_grad(self, layer: str) -> None:
        for parameter in self.module.get_submodule(layer).parameters():
            parameter.requires_grad_(not parameter.requires_grad)
        # With a frozen head alone its task still moves the backbone, but a frozen backbone leaves nothing to share.
        if not self.module.backbone[0][0].weight.requires_grad and not self.module.backbone[4][0].weight.requires_grad:
            self.module.backbone.requires_grad_(True)
        self.trainable = [parameter.requires_grad for parameter in self.parameters]

    @precondition(lambda self: self.trainer is not None)
    @rule()
    def save(self) -> None:
        assert self.trainer is not None
        path = Path(self.folder.name, f"{self.seed}.ckpt")
        self.trainer.save_checkpoint(path)
        self.checkpoint = path, self.trainer.global_step, len(self.callback.reports)
        self.saved = copy.deepcopy(dict(self.module.state_dict())), list(self.trainable)
        assert list(torch.load(path, weights_only=True)["state_dict"]) == self.keys

    @precondition(lambda self: self.checkpoint is not None)
    @rule(count=st.integers(1, 2))
    def resume(self, count: int) -> None:
        assert self.checkpoint is not None
        path, step, reports = self.checkpoint
        self._build()
        for parameter, trainable in zip(self.parameters, self.saved[1], strict=True):
            parameter.requires_grad_(trainable)
        self.trainable = self.saved[1]
        loaded: list[dict[str, Tensor]] = []

        class Loaded(L.Callback):
            def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
                loaded.append(copy.deepcopy(dict(pl_module.state_dict())))

        self.trainer = fit(
            self.module,
            self._batches(count),
            ckpt_path=path,
            callbacks=[self.callback, Loaded()],
            max_epochs=torch.load(path, weights_only=True)["epoch"] + 1,
        )
        assert_same(loaded[0], self.saved[0])
        assert self.trainer.global_step == step + count
        self.num_reports = reports + count

    @invariant()
    def nothing_is_left_behind(self) -> None:
        module = self.module
        assert list(module.state_dict()) == self.keys
        assert all(one is two for one, two in zip(module.parameters(), self.parameters, strict=True))
        assert [parameter.requires_grad for parameter in self.parameters] == self.trainable
        assert all(part.training for part in module.modules())
        assert not any("lora" in name.lower() for name, _ in module.named_modules())
        assert not module.replaying
        assert "log" not in vars(module)
        assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())
        assert len(self.callback.reports) == self.num_reports
        for report in self.callback.reports:
            assert not report.accepted or report.drift <= 0.02

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestTraining = Training.TestCase
TestTraining.settings = settings(
    max_examples=10,
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    database=None,
    # To shrink what fails would train for minutes.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
