"""Errors say what is wrong, and not something else."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import LoHaConfig, LoraConfig
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchjd.aggregation import UPGrad

from lightning_cost import MultiTaskMixin, PenaltySearch
from tests.support.nets import Net, fit, make_batches
from tests.support.task_rows import BackboneNet, Checkpointed
from tests.support.teleporting import teleporter


def test_a_module_of_the_other_package_is_refused_where_it_is_defined() -> None:
    with pytest.raises(TypeError, match=r"Other comes from the package `pytorch_lightning`.*`lightning.pytorch.Light"):
        type("Other", (MultiTaskMixin, pl.LightningModule), {})


def test_a_trainer_of_the_other_package_is_refused() -> None:
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(TypeError, match=r"Trainer comes from the package.*Use `lightning.pytorch.Trainer`"):
        teleporter().setup(trainer, Net(), "fit")


class LazyNet(Net):
    def __init__(self, mtl_method: Any = None, dummy: bool = False) -> None:
        super().__init__(mtl_method)
        self.backbone = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(4))
        if dummy:
            self.backbone(torch.zeros(2, 5))


@pytest.mark.parametrize(("method", "callbacks"), [(UPGrad(), []), (None, ["teleports"])])
def test_a_lazy_module_needs_a_dummy_batch(method: Any, callbacks: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"`backbone.0.weight` of LazyNet .* lazy.*Run a dummy batch"):
        fit(LazyNet(method), make_batches(2), callbacks=[teleporter() for _ in callbacks])
    fit(LazyNet(method, dummy=True), make_batches(2), callbacks=[teleporter() for _ in callbacks])


class ComplexNet(Net):
    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.backbone.register_parameter("phase", nn.Parameter(torch.ones(4, dtype=torch.complex64)))

    def features(self, batch: Any) -> Tensor:
        return super().features(batch) * self.backbone.phase.abs()


@pytest.mark.parametrize(("method", "callbacks"), [(UPGrad(), []), (None, ["teleports"])])
def test_complex_weights_are_refused_by_name(method: Any, callbacks: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"`backbone.phase` is complex .*view_as_complex"):
        fit(ComplexNet(method), make_batches(2), callbacks=[teleporter() for _ in callbacks])
    fit(ComplexNet(), make_batches(2))


class GroupedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 5, 1, groups=5), nn.Flatten())


class NoLayers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.LayerNorm(5))


class Parametrized(Net):
    def __init__(self) -> None:
        super().__init__()
        for index in (0, 2):
            weight_norm(self.backbone[index])


class FrozenWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        for index in (0, 2):
            self.backbone[index].weight.requires_grad_(False)


class Table(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Embedding(3, 4)


@pytest.mark.parametrize(
    ("kind", "adapter", "reason"),
    [
        (GroupedNet, LoraConfig(r=2), r"PEFT supports none of the layers with it \(backbone.1\).*no grouped convol"),
        (Table, LoHaConfig(r=2), r"PEFT supports none of the layers with it \(backbone\).*no Embedding"),
        (NoLayers, LoraConfig(r=2), r"have no Linear, Conv1d, .* layer. Use LevelSetSearch"),
        (Parametrized, LoraConfig(r=2), "all layers are parametrized"),
        (FrozenWeights, LoraConfig(r=2), r"weights are not trained \(backbone.0, backbone.2\). Unfreeze"),
        (Net, LoraConfig(r=2, exclude_modules=".*"), r"`exclude_modules='.*'` leaves out all layers \(backbone.0, "),
        (Net, LoraConfig(r=2, target_modules="conv"), r"`target_modules='conv'` chooses none of the layers backbone.0"),
        (
            Net,
            LoraConfig(r=2, target_modules=["0"], layers_to_transform=[7], layers_pattern="backbone"),
            r"`layers_to_transform=\[7\]` with `target_modules={'0'}` chooses none of the layers",
        ),
    ],
)
def test_an_adapter_is_refused_for_the_reason_that_is_true(kind: Any, adapter: Any, reason: str) -> None:
    name = type(adapter).__name__
    with pytest.raises(MisconfigurationException, match=rf"`adapter` \({name}\) reaches no.*{reason}"):
        fit(kind(), make_batches(2), callbacks=[teleporter(search=PenaltySearch(adapter=adapter))])


class Detached(Net):
    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self.losses(batch) | {"right": self.losses(batch, self.features(batch).detach())["right"]}


@pytest.mark.parametrize(
    ("module", "cause"),
    [
        (Detached(UPGrad()), "It reaches other parameters only. Compute the loss from the output of `shared_module`"),
        (BackboneNet(Checkpointed(use_reentrant=True)), "reentrant activation checkpointing, which hides"),
    ],
    ids=["detached", "reentrant"],
)
def test_a_loss_that_reaches_no_shared_parameter_is_told_why(module: Any, cause: str) -> None:
    batches = [batch | {"x": batch["x"].requires_grad_()} for batch in make_batches(2)]
    with pytest.raises(RuntimeError, match=f"reaches no shared parameter. .*{cause}"):
        fit(module, batches)


def test_a_near_name_is_suggested() -> None:
    module = Net(UPGrad())
    module.shared_module = "backbon"
    with pytest.raises(MisconfigurationException, match=r"has no attribute 'backbon'. Did you mean 'backbone'\?"):
        fit(module, make_batches(1))


def test_a_name_of_the_mixin_that_is_taken_is_named() -> None:
    class Takes(Net):
        def __init__(self) -> None:
            super().__init__()
            self._multi_task = "mine"

    with pytest.raises(MisconfigurationException, match="Takes sets `_multi_task`, a name that MultiTaskMixin uses"):
        fit(Takes(), make_batches(1))


def test_manual_optimization_is_named() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__(UPGrad())
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="needs automatic optimization, but Manual sets"):
        fit(Manual(), make_batches(1))
