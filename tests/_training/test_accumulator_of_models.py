"""The rows of all kinds of shared modules against ``torch.autograd.grad`` of each loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torchjd.aggregation import UPGrad

from lightning_cost._training.shared import shared_modules, shared_parameters
from tests.support.nets import fit, make_batches, make_mlp
from tests.support.task_rows import BackboneNet, Checkpointed, WatchedNet, assert_rows, make_conv_net, swinging_batches


class Twice(nn.Module):
    """Uses one layer two times, and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.layer = nn.Linear(5, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(self.input(x)).tanh() * self.gain)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(1, 4, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x[:, :, None])[0][:, -1]


class Bagged(nn.Module):
    """Averages embeddings of which a batch uses only some."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4, sparse=sparse)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.table(x.abs().mul(4).long().clamp_max(19)).mean(dim=1))


class MixedPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(5, 6).bfloat16(), nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.narrow(x.bfloat16()).double().tanh()).float()


BACKBONES = {
    "linear": lambda: nn.Linear(5, 4),
    "batch norm": lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)),
    "convolution": lambda: make_conv_net(4),
    "channels last": lambda: make_conv_net(4).to(memory_format=torch.channels_last),
    "dropout": lambda: nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 4)),
    "used twice": Twice,
    "recurrent": Recurrent,
    "checkpointed": lambda: Checkpointed(use_reentrant=False),
    "dense embedding": lambda: Bagged(sparse=False),
    "sparse embedding": lambda: Bagged(sparse=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)),
    "compiled": lambda: torch.compile(make_mlp(5, 6, 4), backend="aot_eager"),
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_rows_of_every_kind_of_backbone(name: str, accumulate_grad_batches: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = BackboneNet(BACKBONES[name]())
        fit(module, make_batches(6, size=32), accumulate_grad_batches=accumulate_grad_batches)
    assert_rows(module, steps=6 // accumulate_grad_batches)


def test_rows_of_parameters_of_several_types_have_the_widest() -> None:
    module = BackboneNet(MixedPrecision())
    fit(module, make_batches(1))
    assert_rows(module, steps=1)
    assert module.actual[0].dtype == torch.float64


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.float32), ("64-true", torch.float64)])
def test_rows_have_at_least_single_precision(precision: Any, dtype: torch.dtype) -> None:
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float64
    batches = [{name: tensor.to(kind) for name, tensor in batch.items()} for batch in make_batches(4)]
    module = WatchedNet(UPGrad())
    fit(module, batches, precision=precision)
    assert {parameter.dtype for parameter in module.parameters()} == {kind}
    assert {rows.dtype for rows in module.actual} == {dtype}
    module.expected = [rows.to(dtype) for rows in module.expected]
    assert_rows(module, steps=4, rtol=0.03 if precision == "bf16-true" else 1e-12)


def test_rows_of_several_modules_by_dotted_paths() -> None:
    module = BackboneNet(make_mlp(5, 6, 6, 4), shared_module=["backbone.4", "backbone.0", "backbone.4"])
    fit(module, make_batches(4))
    assert_rows(module, steps=4)
    assert list(shared_modules(module)) == ["backbone.4", "backbone.0"]
    shared = [*module.backbone[4].parameters(), *module.backbone[0].parameters()]
    assert list(map(id, shared_parameters(module))) == list(map(id, shared))
    assert module.actual[0].shape == (3, 6 * 4 + 4 + 5 * 6 + 6)


def test_rows_of_a_weight_tied_to_a_head() -> None:
    class Tied(WatchedNet):
        def __init__(self) -> None:
            super().__init__(UPGrad())
            self.backbone = make_mlp(5, 4, 4)
            self.extra = nn.Linear(4, 4, bias=False)
            self.extra.weight = self.backbone[2].weight

        def losses(self, batch: Any, features: Tensor | None = None) -> dict[str, Tensor]:
            features = self.features(batch)
            return super().losses(batch, features) | {"ink": self.extra(features).square().mean()}

    module = Tied()
    fit(module, make_batches(5))
    assert_rows(module, steps=5)
    assert module.actual[0].shape == (3, 5 * 4 + 4 + 4 * 4 + 4)


def test_a_task_has_zeros_for_shared_parameters_that_it_does_not_touch() -> None:
    class Branches(WatchedNet):
        shared_module = ("backbone", "second")

        def __init__(self) -> None:
            super().__init__(UPGrad())
            self.second = make_mlp(5, 4)

        def losses(self, batch: Any, features: Tensor | None = None) -> dict[str, Tensor]:
            own = super().losses(batch)
            return own | {"ink": self.heads["ink"](self.second(batch["x"])).square().mean()}

    module = Branches()
    fit(module, make_batches(6))
    assert_rows(module, steps=6)
    first = sum(parameter.numel() for parameter in module.backbone.parameters())
    for rows in module.actual:
        assert not rows[:2, first:].any()
        assert not rows[2, :first].any()
        assert rows[:2, :first].any(dim=1).all()
        assert rows[2, first:].any()


def test_rows_keep_nothing_of_the_last_batch_if_a_task_uses_other_parameters_in_each() -> None:
    class Alternating(WatchedNet):
        shared_module = ("backbone", "second")

        def __init__(self) -> None:
            super().__init__(UPGrad())
            self.second = make_mlp(5, 4)

        def losses(self, batch: Any, features: Tensor | None = None) -> dict[str, Tensor]:
            features = self.second(batch["x"]) if batch["odd"] else self.features(batch)
            return super().losses(batch) | {"ink": self.heads["ink"](features).square().mean()}

    module = Alternating()
    fit(module, swinging_batches(6))
    assert_rows(module, steps=6)
    first = sum(parameter.numel() for parameter in module.backbone.parameters())
    assert [bool(rows[2, first:].any()) for rows in module.expected] == [False, True] * 3


def test_rows_leave_out_frozen_parameters_and_follow_when_they_are_unfrozen() -> None:
    class Finetuned(WatchedNet):
        def configure_optimizers(self) -> Any:
            trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return torch.optim.SGD(trainable, lr=0.05)

    module = Finetuned(UPGrad())
    module.shared_module = ["backbone", "neck"]
    module.neck = make_mlp(4, 4)
    module.features = lambda batch: module.neck(module.backbone(batch["x"]).tanh())
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    fit(module, make_batches(3), max_epochs=2, callbacks=[unfreeze])
    assert_rows(module, steps=6)
    neck, backbone = 4 * 4 + 4, 5 * 6 + 6 + 6 * 4 + 4
    assert [rows.shape[1] for rows in module.actual] == [neck] * 3 + [backbone + neck] * 3
