"""What the parameters are updated with: against plain Lightning and hand-written loops with TorchJD."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torchjd import aggregation, scalarization
from torchjd.aggregation import UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward

from tests.support.nets import TASKS, Net, PlainNet, assert_moved, assert_same_parameters, fit, make_batches, make_mlp


class SeededNet(Net):
    """Seeds torch's generator before the aggregation, which some methods draw from."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        torch.manual_seed(self.global_step)
        super().backward(loss, *args, **kwargs)


def train_by_hand(
    net: Any, batches: Any, aggregator: Any, clip: Any = lambda parameters: None, schedule: Any = None
) -> PlainNet:
    """A plain PyTorch loop with TorchJD, as its documentation shows it."""
    optimizer = net.configure_optimizers()
    scheduler = schedule(optimizer) if schedule else None
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        features = net.features(batch)
        losses = net.losses(batch, features)
        mtl_backward(
            list(losses.values()),
            features=features,
            tasks_params=[net.heads[task].parameters() for task in losses],
            shared_params=net.backbone.parameters(),
        )
        torch.manual_seed(step)
        jac_to_grad(net.backbone.parameters(), aggregator)
        clip(list(net.parameters()))
        optimizer.step()
        if scheduler:
            scheduler.step()
    return net


AGGREGATORS = {
    "UPGrad": aggregation.UPGrad,
    "DualProj": aggregation.DualProj,
    "FairGrad": functools.partial(aggregation.FairGrad, alpha=1.0),
    "MGDA": aggregation.MGDA,
    "PCGrad": aggregation.PCGrad,
    "IMTLG": aggregation.IMTLG,
    "AlignedMTL": aggregation.AlignedMTL,
    "ConFIG": aggregation.ConFIG,
    "GradDrop": aggregation.GradDrop,
    "Sum": aggregation.Sum,
    "Constant": lambda: aggregation.Constant(torch.tensor([0.5, 2.0, -1.0])),
}


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*[(name, torch.optim.SGD) for name in AGGREGATORS], ("UPGrad", torch.optim.Adam), ("ConFIG", torch.optim.AdamW)],
)
def test_an_aggregator_updates_as_a_hand_written_loop_with_torchjd(name: str, optimizer: Any) -> None:
    make, batches = AGGREGATORS[name], make_batches(12)
    module, reference = SeededNet(make()), PlainNet()
    for net in (module, reference):
        net.make_optimizer = functools.partial(optimizer, lr=0.02)
    with torch.random.fork_rng(devices=[]):
        fit(module, batches)
        train_by_hand(reference, batches, make())
    assert module.global_step == 12
    assert_moved(module)
    assert_same_parameters(module, reference, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (None, {}),
        (scalarization.Mean(), {}),
        (None, {"accumulate_grad_batches": 3}),
        (None, {"gradient_clip_val": 0.1}),
        (None, {"precision": "bf16-mixed"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("request_every", [0, 2])
def test_the_mean_trains_as_plain_lightning_bit_for_bit(
    method: Any, settings: dict[str, Any], request_every: int
) -> None:
    """With batch statistics and dropout, also in the steps in which somebody looks at the task gradients."""
    batches = make_batches(8)
    module, plain = Net(method), PlainNet()
    module.on_train_batch_start = lambda batch, batch_idx: (
        module.request_task_gradients() if request_every and batch_idx % request_every == 0 else None
    )
    for net in (module, plain):
        net.backbone = nn.Sequential(make_mlp(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), make_mlp(6, 4))
        net.make_optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    with torch.random.fork_rng(devices=[]):
        for net in (module, plain):
            torch.manual_seed(7)
            fit(net, batches, max_epochs=2, **settings)
    assert module.global_step == plain.global_step > 0
    for actual, expected in zip(module.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(actual, expected)


SCALARIZERS = {
    "Constant": lambda: scalarization.Constant(torch.tensor([0.3, 2.0, 1.0])),
    "GeometricMean": scalarization.GeometricMean,
    "UW": lambda: scalarization.UW(3),
    "IMTLL": lambda: scalarization.IMTLL(3),
}


@pytest.mark.parametrize("name", SCALARIZERS)
def test_a_scalarizer_and_its_parameters_train_as_in_a_hand_written_loop(name: str) -> None:
    module, reference = Net(SCALARIZERS[name]()), PlainNet()
    reference.mtl_method = SCALARIZERS[name]()
    optimizer, batches = reference.configure_optimizers(), make_batches(12)
    fit(module, batches)
    for batch in batches:
        optimizer.zero_grad()
        reference.mtl_method(torch.stack(list(reference.losses(batch).values()))).backward()
        optimizer.step()
    assert_same_parameters(module, reference, atol=1e-6)
    start = dict(SCALARIZERS[name]().named_parameters())
    assert all(not torch.equal(module.mtl_method.get_parameter(key), value) for key, value in start.items())
    assert module.task_gradients is None


class HeadGradients(L.Callback):
    """Compares ``.grad`` of each head with the gradient of its own loss, evaluated again."""

    def __init__(self, weights: Any) -> None:
        self.weights, self.steps = dict(zip(TASKS, weights, strict=True)), 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        with torch.enable_grad():
            losses = pl_module.losses(self.batch)
        for task, weight in self.weights.items():
            head = list(pl_module.heads[task].parameters())
            for parameter, own in zip(head, torch.autograd.grad(losses[task], head), strict=True):
                torch.testing.assert_close(parameter.grad, weight * own, rtol=1e-5, atol=1e-7)
        self.steps += 1


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        (UPGrad(), (1, 1, 1)),
        (aggregation.Mean(), (1, 1, 1)),
        (None, (1 / 3, 1 / 3, 1 / 3)),
        (scalarization.Constant(torch.tensor([0.3, 2.0, 1.0])), (0.3, 2.0, 1.0)),
    ],
)
def test_heads_have_the_gradients_of_their_own_losses(method: Any, weights: Any) -> None:
    check = HeadGradients(weights)
    fit(Net(method, scales=(1.0, 10.0, 0.1)), make_batches(4), callbacks=[check])
    assert check.steps == 4


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_acts_on_the_aggregated_gradient(algorithm: str) -> None:
    clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]
    batches, limit = make_batches(12), {"norm": 0.5, "value": 0.05}[algorithm]
    module = Net(UPGrad())
    fit(module, batches, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    reference = train_by_hand(PlainNet(), batches, UPGrad(), clip=lambda parameters: clip(parameters, limit))
    assert_same_parameters(module, reference, atol=1e-5)
    unclipped = train_by_hand(PlainNet(), batches, UPGrad())
    with pytest.raises(AssertionError):
        assert_same_parameters(module, unclipped, atol=1e-3)


def test_learning_rate_schedules_work() -> None:
    batches, schedule = make_batches(12), functools.partial(StepLR, step_size=4, gamma=0.1)
    module = Net(UPGrad())

    def configure_optimizers() -> Any:
        optimizer = PlainNet.configure_optimizers(module)
        return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]

    module.configure_optimizers = configure_optimizers
    trainer = fit(module, batches)
    assert_same_parameters(module, train_by_hand(PlainNet(), batches, UPGrad(), schedule=schedule), atol=1e-5)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 1e-3)


def test_parameter_groups_have_their_own_learning_rates() -> None:
    class Grouped(PlainNet):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": self.heads.parameters(), "lr": 0.1},
                {"params": self.backbone[0].parameters(), "lr": 0.01, "momentum": 0.9},
                {"params": self.backbone[2].parameters(), "weight_decay": 0.1},
            ]
            return torch.optim.SGD(groups, lr=0.05)

    class GroupedNet(Net, Grouped):
        pass

    batches, module = make_batches(12), GroupedNet(UPGrad())
    fit(module, batches)
    assert_same_parameters(module, train_by_hand(Grouped(), batches, UPGrad()), atol=1e-5)


@pytest.mark.parametrize("method", [None, UPGrad(), scalarization.Constant(torch.tensor([0.3, 2.0, 1.0]))])
def test_four_accumulated_batches_equal_the_fourfold_batch(method: Any) -> None:
    small = make_batches(16)
    large = [
        {name: torch.cat([batch[name] for batch in small[i : i + 4]]) for name in small[0]} for i in range(0, 16, 4)
    ]
    accumulated, whole = Net(method), Net(method)
    fit(accumulated, small, accumulate_grad_batches=4, max_epochs=2)
    fit(whole, large, max_epochs=2)
    assert accumulated.global_step == whole.global_step == 8
    assert_moved(whole)
    assert_same_parameters(accumulated, whole, atol=1e-5)


def test_an_incomplete_window_is_aggregated_as_lightning_weighs_it() -> None:
    batches, module, reference = make_batches(10), Net(UPGrad()), PlainNet()
    fit(module, batches, accumulate_grad_batches=4)
    optimizer, shared = reference.configure_optimizers(), list(reference.backbone.parameters())
    for window in (batches[:4], batches[4:8], batches[8:]):
        rows = [torch.zeros(sum(parameter.numel() for parameter in shared)) for _ in TASKS]
        optimizer.zero_grad()
        for batch in window:
            losses = reference.losses(batch)
            for row, loss in zip(rows, losses.values(), strict=True):
                gradients = torch.autograd.grad(loss / 4, shared, retain_graph=True)
                row.add_(torch.cat([gradient.flatten() for gradient in gradients]))
            (sum(losses.values()) / 4).backward()
        pieces = UPGrad()(torch.stack(rows)).split([parameter.numel() for parameter in shared])
        for parameter, piece in zip(shared, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        optimizer.step()
    assert module.global_step == 3
    assert_same_parameters(module, reference, atol=1e-5)


class LookupNet(Net):
    """Looks its features up in a table, of which a batch uses only some rows."""

    def __init__(self, mtl_method: Any, sparse: bool) -> None:
        super().__init__(mtl_method)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.backbone = nn.Embedding(20, 4, sparse=sparse)

    def features(self, batch: Any) -> Tensor:
        return self.backbone(batch["x"].abs().mul(4).long().clamp_max(19)).mean(dim=1).tanh()


@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_sparse_gradients_stay_sparse_under_an_aggregator(accumulate_grad_batches: int) -> None:
    sparse, dense = LookupNet(UPGrad(), sparse=True), LookupNet(UPGrad(), sparse=False)
    for net in (sparse, dense):
        fit(net, make_batches(12), accumulate_grad_batches=accumulate_grad_batches)
    assert sparse.backbone.weight.grad.is_sparse
    assert not dense.backbone.weight.grad.is_sparse
    assert_same_parameters(sparse, dense, atol=1e-5)


def test_a_shared_parameter_that_no_task_uses_is_left_alone_as_in_plain_lightning() -> None:
    nets = Net(UPGrad()), PlainNet()
    for net in nets:
        net.backbone.unused = nn.Linear(3, 3)
        net.backbone.forward = lambda x, net=net: net.backbone[:3](x)
        net.make_optimizer = functools.partial(torch.optim.AdamW, weight_decay=0.1)
        before = net.backbone.unused.weight.clone()
        fit(net, make_batches(3))
        assert torch.equal(net.backbone.unused.weight, before)


def test_a_single_task_trains_as_alone() -> None:
    module, plain = Net(UPGrad(), tasks=["left"]), PlainNet(tasks=["left"])
    fit(module, make_batches(12))
    fit(plain, make_batches(12))
    assert_same_parameters(module, plain, atol=1e-5)
