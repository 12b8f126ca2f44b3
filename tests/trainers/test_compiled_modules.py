"""Compiled code and activation checkpointing under task gradients and teleports."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch._functorch.config as functorch_config
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchjd.aggregation import UPGrad

from lightning_cost import PenaltySearch
from lightning_cost.searches import LevelSetSearch
from tests.support.nets import Batch, Net, fit, make_batches, make_mlp, values_of
from tests.support.teleporting import NoisyNet, teleporter

pytestmark = pytest.mark.slow

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled, and the setting that a process starts with."""
    torch._dynamo.reset()
    functorch_config.donated_buffer = True
    yield
    torch._dynamo.reset()


class Deep(Net):
    """What the middle layers save is freed by a backward that runs only once."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.backbone = make_mlp(5, 6, 6, 4)


def replaced(module: Deep, backend: Any) -> Any:
    module.backbone = torch.compile(module.backbone, backend=backend)
    return module


def in_place(module: Deep, backend: Any) -> Any:
    module.backbone.compile(backend=backend)
    return module


def whole(module: Deep, backend: Any) -> Any:
    return torch.compile(module, backend=backend)


of_the_backbone = pytest.mark.parametrize("compiled", [replaced, in_place])


callbacks_of = {
    "no teleports": list,
    "level set": lambda: [teleporter()],
    "penalty": lambda: [teleporter(search=PenaltySearch(steps=2, lr=3e-3))],
}


def assert_trains_as_eager(
    compiled: Callable[[Deep, Any], Any], backend: Any, method: Callable[[], Any], callbacks: Callable[[], list[Any]]
) -> None:
    module, reference = Deep(method()), Deep(method())
    fit(compiled(module, backend), make_batches(5), callbacks=(found := callbacks()))
    fit(reference, make_batches(5), callbacks=(expected := callbacks()))
    torch.testing.assert_close(values_of(module), values_of(reference), rtol=0, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert [report.accepted for report in ours.reports] == [report.accepted for report in theirs.reports]
        assert any(report.accepted for report in ours.reports)


@pytest.mark.parametrize(("method", "callbacks"), [(UPGrad, "no teleports"), (UPGrad, "penalty"), (None, "level set")])
@of_the_backbone
def test_a_compiled_backbone_trains_as_an_eager_one(compiled: Any, method: Any, callbacks: str) -> None:
    assert_trains_as_eager(compiled, "aot_eager", method or (lambda: None), callbacks_of[callbacks])


@needs_compiler
def test_a_backbone_compiled_by_inductor_trains_as_an_eager_one() -> None:
    assert_trains_as_eager(replaced, "inductor", UPGrad, callbacks_of["penalty"])


def test_layers_keep_the_names_by_which_an_adapter_targets_them() -> None:
    module, reference = replaced(Deep(), "eager"), Deep()
    for net in (module, reference):
        config = LoraConfig(r=2, target_modules=r"backbone\.2")
        fit(net, make_batches(3), callbacks=[teleporter(search=PenaltySearch(config, steps=2))])
    assert torch.equal(values_of(module), values_of(reference))


class Request(L.Callback):
    """Asks for task gradients from the second epoch on."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.request_task_gradients()


@pytest.mark.parametrize("make", [Request, partial(teleporter, start_epoch=1)])
@of_the_backbone
def test_task_gradients_may_be_needed_after_steps_without(compiled: Any, make: Callable[[], Any]) -> None:
    module, reference = Deep(), Deep()
    fit(compiled(module, "aot_eager"), make_batches(3), callbacks=[make()], max_epochs=2)
    fit(reference, make_batches(3), callbacks=[make()], max_epochs=2)
    torch.testing.assert_close(values_of(module), values_of(reference), rtol=0, atol=1e-5)


def test_what_was_compiled_to_run_backward_once_is_compiled_again() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    plain = replaced(Deep(), counter)
    fit(plain, make_batches(2))
    assert functorch_config.donated_buffer
    assert counter.frame_count == 1
    reference = Deep(UPGrad())
    reference.backbone.load_state_dict(plain.backbone._orig_mod.state_dict())
    module = Deep(UPGrad())
    module.backbone = plain.backbone
    fit(module, make_batches(4))
    fit(reference, make_batches(4))
    assert counter.frame_count == 2
    torch.testing.assert_close(values_of(module), values_of(reference), rtol=0, atol=1e-5)
    fit(module, make_batches(4))
    assert counter.frame_count == 2


class Counts(L.Callback):
    """How often something was compiled, after each step."""

    def __init__(self, counter: CompileCounterWithBackend) -> None:
        self.counter = counter
        self.counts: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.counts.append(self.counter.frame_count)


class Validated(Deep):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.losses(batch)

    def val_dataloader(self) -> Any:
        return DataLoader(make_batches(1), batch_size=None)


@pytest.mark.parametrize("search", [LevelSetSearch(), PenaltySearch(steps=2)], ids=["level set", "penalty"])
@of_the_backbone
def test_teleports_compile_the_backbone_once(compiled: Any, search: Any) -> None:
    counter = CompileCounterWithBackend("eager")
    counts, teleport = Counts(counter), teleporter(search=search, check_every_n_steps=2)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
    fit(compiled(Validated(UPGrad()), counter), make_batches(4), callbacks=[teleport, counts], **settings)
    assert len(teleport.reports) == 2
    # The second time for validation, which has no gradients. With PyTorch 2.11 the counter does not see a module that
    # is compiled in place.
    first = counts.counts[0]
    assert first == 1 or torch.__version__ < "2.15"
    assert counts.counts == [first] * 4 + [2 * first] * 4


def test_a_compiled_lightning_module_trains_as_an_eager_one_and_is_compiled_once() -> None:
    counter, reference, module = CompileCounterWithBackend("eager"), Deep(), Deep()
    # The first backward passes, without teleports, are ordinary ones.
    make = partial(teleporter, search=PenaltySearch(steps=2, lr=3e-3), check_every_n_steps=2, start_epoch=1)
    counts, teleport, expected = Counts(counter), make(), make()
    settings = {"max_epochs": 4, "accumulate_grad_batches": 2}
    fit(whole(module, counter), make_batches(4), callbacks=[teleport, counts], **settings)
    fit(reference, make_batches(4), callbacks=[expected], **settings)
    torch.testing.assert_close(values_of(module), values_of(reference), rtol=0, atol=1e-5)
    assert [report.accepted for report in teleport.reports] == [report.accepted for report in expected.reports]
    assert any(report.accepted for report in teleport.reports)
    # The second epoch is the first with batches to record; the rest is the same code.
    assert counts.counts[0] > 0
    assert counts.counts[8:] == counts.counts[7:8] * 8


class Checkpointed(Net):
    """Computes the backbone again instead of keeping what its layers save."""

    def __init__(self, mtl_method: Any = None, use_reentrant: bool = False, differentiable: bool = False) -> None:
        super().__init__(mtl_method)
        self.backbone = NoisyNet().backbone
        # It would count every time that it is computed again, which no training step depends on.
        self.backbone[1] = nn.BatchNorm1d(6, track_running_stats=False)
        self.use_reentrant, self.differentiable = use_reentrant, differentiable

    def features(self, batch: Batch) -> Tensor:
        x = batch["x"].clone().requires_grad_(self.differentiable)
        return checkpoint(self.backbone, x, use_reentrant=self.use_reentrant).tanh()


class Kept(Checkpointed):
    features = Net.features


@pytest.mark.parametrize(("method", "callbacks"), [(UPGrad, "no teleports"), (UPGrad, "penalty"), (None, "level set")])
def test_activation_checkpointing_changes_nothing(method: Any, callbacks: str) -> None:
    make = method or (lambda: None)
    module, reference = Checkpointed(make()), Kept(make())
    for net in (module, reference):
        torch.manual_seed(0)
        fit(net, make_batches(6), callbacks=callbacks_of[callbacks](), accumulate_grad_batches=2)
    torch.testing.assert_close(values_of(module), values_of(reference), rtol=0, atol=1e-6)


class HalfCheckpointed(Checkpointed):
    """Its first layer has ordinary gradients, which must not hide that the others have none."""

    def features(self, batch: Batch) -> Tensor:
        return checkpoint(self.backbone[1:], self.backbone[0](batch["x"]), use_reentrant=True).tanh()


@pytest.mark.parametrize(("method", "callbacks"), [(UPGrad, "no teleports"), (None, "level set"), (None, "penalty")])
@pytest.mark.parametrize(
    "make",
    [
        partial(Checkpointed, use_reentrant=True),
        partial(Checkpointed, use_reentrant=True, differentiable=True),
        HalfCheckpointed,
    ],
    ids=["plain inputs", "differentiable inputs", "half"],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused(make: Any, method: Any, callbacks: str) -> None:
    module = make(method() if method else None)
    before = values_of(module)
    with pytest.raises(RuntimeError, match=r"use_reentrant=(False|True)"):
        fit(module, make_batches(2), callbacks=callbacks_of[callbacks]())
    assert torch.equal(values_of(module), before)
