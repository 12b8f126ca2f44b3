"""The mixin under Lightning's Trainer: what the parameters are updated with, and what is refused."""

import copy
import functools
import pickle
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torchjd import aggregation, scalarization
from torchjd.aggregation import UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward

from lightning_cost import MultiTaskMixin
from lightning_cost._training.engine import engine_of
from tests.support.nets import TASKS, Net, PlainNet, fit, make_batches, make_mlp


def assert_same_parameters(module, reference, atol=0.0):
    """Parameters by name, bit for bit unless told otherwise."""
    expected = dict(reference.named_parameters())
    actual = {name: parameter for name, parameter in module.named_parameters() if name in expected}
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        torch.testing.assert_close(
            parameter, expected[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_moved(module):
    for name, parameter in type(module)().named_parameters():
        assert not torch.equal(parameter, module.get_parameter(name)), name


# --- The update ------------------------------------------------------------------------------------------------------


class SeededNet(Net):
    """Seeds torch's generator before the aggregation, which some methods draw from."""

    def on_before_optimizer_step(self, optimizer):
        torch.manual_seed(self.global_step)
        super().on_before_optimizer_step(optimizer)


def train_by_hand(net, batches, aggregator, clip=lambda parameters: None, schedule=None):
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
def test_an_aggregator_updates_as_a_hand_written_loop_with_torchjd(name, optimizer):
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
def test_the_mean_trains_as_plain_lightning_bit_for_bit(method, settings, request_every):
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
def test_a_scalarizer_trains_as_a_hand_written_loop_its_own_parameters_included(name):
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

    def __init__(self, weights):
        self.weights, self.steps = dict(zip(TASKS, weights, strict=True)), 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
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
def test_heads_have_the_gradients_of_their_own_losses(method, weights):
    check = HeadGradients(weights)
    fit(Net(method, scales=(1.0, 10.0, 0.1)), make_batches(4), callbacks=[check])
    assert check.steps == 4


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_acts_on_the_aggregated_gradient(algorithm):
    clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]
    batches, limit = make_batches(12), {"norm": 0.5, "value": 0.05}[algorithm]
    module = Net(UPGrad())
    fit(module, batches, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    reference = train_by_hand(PlainNet(), batches, UPGrad(), clip=lambda parameters: clip(parameters, limit))
    assert_same_parameters(module, reference, atol=1e-5)
    unclipped = train_by_hand(PlainNet(), batches, UPGrad())
    with pytest.raises(AssertionError):
        assert_same_parameters(module, unclipped, atol=1e-3)


def test_learning_rate_schedules_work():
    batches, schedule = make_batches(12), functools.partial(StepLR, step_size=4, gamma=0.1)
    module = Net(UPGrad())

    def configure_optimizers():
        optimizer = PlainNet.configure_optimizers(module)
        return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]

    module.configure_optimizers = configure_optimizers
    trainer = fit(module, batches)
    assert_same_parameters(module, train_by_hand(PlainNet(), batches, UPGrad(), schedule=schedule), atol=1e-5)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 1e-3)


def test_parameter_groups_have_their_own_learning_rates():
    class Grouped(PlainNet):
        def configure_optimizers(self):
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
def test_four_accumulated_batches_equal_the_fourfold_batch(method):
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


def test_an_incomplete_window_is_aggregated_as_lightning_weighs_it():
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

    def __init__(self, mtl_method, sparse):
        super().__init__(mtl_method)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.backbone = nn.Embedding(20, 4, sparse=sparse)

    def features(self, batch):
        return self.backbone(batch["x"].abs().mul(4).long().clamp_max(19)).mean(dim=1).tanh()


@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_sparse_gradients_stay_sparse_under_an_aggregator(accumulate_grad_batches):
    sparse, dense = LookupNet(UPGrad(), sparse=True), LookupNet(UPGrad(), sparse=False)
    for net in (sparse, dense):
        fit(net, make_batches(12), accumulate_grad_batches=accumulate_grad_batches)
    assert sparse.backbone.weight.grad.is_sparse
    assert not dense.backbone.weight.grad.is_sparse
    assert_same_parameters(sparse, dense, atol=1e-5)


def test_a_shared_parameter_that_no_task_uses_is_left_alone_as_in_plain_lightning():
    nets = Net(UPGrad()), PlainNet()
    for net in nets:
        net.backbone.unused = nn.Linear(3, 3)
        net.backbone.forward = lambda x, net=net: net.backbone[:3](x)
        net.make_optimizer = functools.partial(torch.optim.AdamW, weight_decay=0.1)
        before = net.backbone.unused.weight.clone()
        fit(net, make_batches(3))
        assert torch.equal(net.backbone.unused.weight, before)


def test_freezing_between_backward_and_step_leaves_the_other_gradients_in_their_places():
    class Freeze(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            pl_module.backbone[0].requires_grad_(False)

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            pl_module.backbone[0].requires_grad_(True)

    frozen, free = Net(UPGrad()), Net(UPGrad())
    fit(frozen, make_batches(1), callbacks=[Freeze()])
    fit(free, make_batches(1))
    assert_same_parameters(frozen, free)


@pytest.mark.parametrize("method", [None, UPGrad()])
def test_a_batch_can_be_a_tuple(method):
    class TupleNet(Net):
        def task_losses(self, batch, batch_idx):
            assert isinstance(batch, (tuple, list))
            return self.losses(dict(zip(("x", *TASKS), batch, strict=True)))

    batches = make_batches(4)
    module, reference = TupleNet(method), Net(method)
    fit(module, [tuple(batch.values()) for batch in batches])
    fit(reference, batches)
    assert_same_parameters(module, reference)


def test_keys_may_come_in_another_order():
    class Shuffled(Net):
        def task_losses(self, batch, batch_idx):
            losses = list(self.losses(batch).items())
            return dict(losses[batch_idx % 3 :] + losses[: batch_idx % 3])

    module, reference = Shuffled(UPGrad(), scales=(1.0, 10.0, 0.1)), Net(UPGrad(), scales=(1.0, 10.0, 0.1))
    fit(module, make_batches(6))
    fit(reference, make_batches(6))
    assert module.task_gradients.names == TASKS
    assert_same_parameters(module, reference)


def test_losses_may_differ_in_type():
    class Mixed(Net):
        def task_losses(self, batch, batch_idx):
            left, right, ink = self.losses(batch).values()
            return {"left": left.bfloat16(), "right": right.double(), "ink": ink}

    module = Mixed(UPGrad())
    fit(module, make_batches(3))
    assert_moved(module)
    assert module.task_gradients.matrix.dtype == torch.float32


def test_a_single_task_trains_as_alone():
    module, plain = Net(UPGrad(), tasks=["left"]), PlainNet(tasks=["left"])
    fit(module, make_batches(12))
    fit(plain, make_batches(12))
    assert_same_parameters(module, plain, atol=1e-5)


# --- Who asks for task gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, scalarization.UW(3)])
def test_nothing_is_differentiated_for_nobody(method, differentiations):
    module = Net(method)
    fit(module, make_batches(3))
    assert differentiations == []
    assert module.task_gradients is None


class Availability(L.Callback):
    """The hooks, in order, in which the task gradients can be read; asks for them at the given batches."""

    def __init__(self, request_at=()):
        self.request_at, self.available = request_at, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in self.request_at:
            pl_module.request_task_gradients()

    def _note(self, hook, pl_module):
        if pl_module.task_gradients is not None:
            assert pl_module.task_gradients.matrix.isfinite().all()
            self.available.append((hook, pl_module.global_step))

    def on_after_backward(self, trainer, pl_module):
        self._note("backward", pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._note("step", pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self._note("end", pl_module)


def test_a_request_holds_for_one_optimizer_step():
    callback, module = Availability(request_at=[1, 3]), Net()
    fit(module, make_batches(5), callbacks=[callback])
    assert callback.available == [
        *[("backward", 1), ("step", 1), ("end", 2)],
        *[("backward", 3), ("step", 3), ("end", 4)],
    ]
    assert module.task_gradients is None


def test_a_request_holds_for_all_micro_batches_of_an_optimizer_step():
    callback = Availability(request_at=[2])
    fit(Net(), make_batches(6), callbacks=[callback], accumulate_grad_batches=2)
    assert callback.available == [("backward", 1), ("end", 1), ("backward", 1), ("step", 1), ("end", 2)]


def test_an_aggregator_has_task_gradients_at_every_step():
    callback, module = Availability(), Net(UPGrad())
    assert module.task_gradients is None
    fit(module, make_batches(3), callbacks=[callback])
    hooks = [("backward", 0), ("step", 0), ("end", 1)]
    assert callback.available == [(hook, step + i) for i in range(3) for hook, step in hooks]


def test_reading_the_task_gradients_changes_nothing():
    read, unread = Net(UPGrad()), Net(UPGrad())
    fit(read, make_batches(8), callbacks=[Availability()], accumulate_grad_batches=2)
    fit(unread, make_batches(8), accumulate_grad_batches=2)
    assert_same_parameters(read, unread)


def test_batches_are_recorded_until_the_optimizer_step_and_those_of_validation_never():
    class Validated(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx < 4:
                engine_of(self).step.wants_batches = True

        def validation_step(self, batch, batch_idx):
            return self.training_step(batch, batch_idx)

        def val_dataloader(self):
            return DataLoader(make_batches(2, seed=1), batch_size=None)

        def on_before_optimizer_step(self, optimizer):
            recorded.append([record.batch_idx for record in engine_of(self).step.batches])
            values.extend(record.losses for record in engine_of(self).step.batches)
            super().on_before_optimizer_step(optimizer)

    recorded, values, batches = [], [], make_batches(8)
    module = Validated()
    with torch.no_grad():
        first = torch.stack(list(module.losses(batches[0]).values()))
    fit(module, batches, accumulate_grad_batches=4, val_check_interval=2)
    assert recorded == [[0, 1, 2, 3], []]
    assert torch.equal(values[0], first)


def test_task_losses_and_their_scalarization_are_logged():
    module, seen = Net(UPGrad(), scales=(1.0, 2.0, 3.0)), []
    module.on_train_batch_end = lambda *args: seen.append(dict(module.trainer.callback_metrics))
    with torch.no_grad():
        first = module.losses(make_batches(1)[0])
    fit(module, make_batches(2))
    assert set(seen[0]) == {"train/left_loss", "train/right_loss", "train/ink_loss", "train/loss"}
    for task, loss in first.items():
        assert seen[0][f"train/{task}_loss"].item() == pytest.approx(loss.item())
    assert seen[0]["train/loss"].item() == pytest.approx(sum(first.values()).item())


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda losses: losses | {"right": losses["right"].expand(2)}, ValueError, r"'right' must be a scalar.*\(2,\)"),
        (lambda losses: losses | {"ink": 0.5}, ValueError, "'ink' must be a scalar tensor; got type float"),
        (lambda losses: losses | {"ink": None}, ValueError, "'ink' must be a scalar tensor; got type NoneType"),
        (lambda losses: losses | {"left": losses["left"] * torch.nan}, ValueError, "task 'left' is not finite.*nan"),
        (lambda losses: losses | {"ink": losses["ink"] / 0}, ValueError, "task 'ink' is not finite: {'ink': inf}"),
        (lambda losses: {}, TypeError, r"dictionary with a scalar tensor per task.*got \{\}"),
        (lambda losses: list(losses.values()), TypeError, r"dictionary with a scalar tensor per task.*got \["),
        (lambda losses: sum(losses.values()), TypeError, "dictionary with a scalar tensor per task.*got tensor"),
        (lambda losses: None, TypeError, "dictionary with a scalar tensor per task.*got None"),
    ],
)
@pytest.mark.parametrize("method", [None, UPGrad(), scalarization.UW(3)])
def test_bad_losses_are_refused_by_name_before_anything_changes(returned, error, message, method):
    class Bad(Net):
        def task_losses(self, batch, batch_idx):
            return returned(self.losses(batch))

    module = Bad(method)
    with pytest.raises(error, match=message):
        fit(module, make_batches(1))
    assert_same_parameters(module, Net())


def test_all_losses_that_are_not_finite_are_named():
    module = Net(scales=(torch.nan, 1.0, torch.inf))
    with pytest.raises(ValueError, match="loss of task 'left', 'ink' is not finite"):
        fit(module, make_batches(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda losses: {"left": losses["left"]}, r"Missing now: \['ink', 'right'\]; not there before: \[\]"),
        (lambda losses: losses | {"new": losses["left"]}, r"Missing now: \[\]; not there before: \['new'\]"),
    ],
)
@pytest.mark.parametrize("method", [None, UPGrad()])
def test_tasks_that_change_during_a_run_are_refused(change, message, method):
    class Changing(Net):
        def task_losses(self, batch, batch_idx):
            losses = self.losses(batch)
            return change(losses) if batch_idx == 2 else losses

    with pytest.raises(ValueError, match=message):
        fit(Changing(method), make_batches(3))


@pytest.mark.parametrize(
    ("shared_module", "message"),
    [
        ("encoder", "Net has no attribute 'encoder'"),
        ("backbone.7", "Net has no attribute 'backbone.7'"),
        (["backbone", "encoder"], "Net has no attribute 'encoder'"),
        ("scales", "'scales' must be a torch.nn.Module; got dict"),
        ("backbone.0.weight", "'backbone.0.weight' must be a torch.nn.Module; got Parameter"),
        ([], r"`shared_module=\[\]` of Net has no parameter that requires a gradient"),
        ("backbone.1", "`shared_module='backbone.1'` of Net has no parameter that requires a gradient"),
        (None, "must be the name of the attribute that holds the shared module.*got None"),
        (nn.Linear(2, 2), "must be the name of the attribute that holds the shared module.*got Linear"),
    ],
)
def test_a_wrong_shared_module_is_refused(shared_module, message):
    module = Net(UPGrad())
    module.shared_module = shared_module
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, make_batches(1))


def test_a_frozen_shared_module_is_refused():
    module = Net(UPGrad())
    module.backbone.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="unfreeze some of them"):
        fit(module, make_batches(1))


@pytest.mark.parametrize("method", ["UPGrad", UPGrad, sum, aggregation.UPGradWeighting(), 3])
def test_a_wrong_method_is_refused(method):
    with pytest.raises(MisconfigurationException, match="`mtl_method` must be a torchjd"):
        fit(Net(method), make_batches(1))


def test_a_method_that_is_not_set_is_the_mean():
    class Bare(MultiTaskMixin, PlainNet):
        def task_losses(self, batch, batch_idx):
            return self.losses(batch)

    module, plain = Bare(), PlainNet()
    fit(module, make_batches(3))
    fit(plain, make_batches(3))
    assert_same_parameters(module, plain)


def test_task_losses_must_be_written():
    class Forgetful(MultiTaskMixin, PlainNet):
        pass

    message = r"Forgetful must implement `task_losses\(self, batch, batch_idx\)`"
    started = Started()
    with pytest.raises(MisconfigurationException, match=message):
        fit(Forgetful(), make_batches(1), callbacks=[started])
    assert not started.batches
    with pytest.raises(NotImplementedError, match=message):
        Forgetful().task_losses(make_batches(1)[0], 0)


class Started(L.Callback):
    batches = 0

    def on_train_batch_start(self, *args):
        self.batches += 1


class WithoutSuper(Net):
    def training_step(self, batch, batch_idx):
        return sum(self.losses(batch).values())


class WithPenalty(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * self.backbone[0].weight.square().sum()


class WithDictionary(Net):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "extra": batch_idx}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WithoutSuper, r"WithoutSuper.training_step did not call `super\(\).training_step\(batch, batch_idx\)`"),
        (WithPenalty, "WithPenalty.training_step returned a loss other than the one of MultiTaskMixin.*no task"),
    ],
)
@pytest.mark.parametrize("accumulate_grad_batches", [1, 3])
def test_a_training_step_with_another_loss_is_refused_where_task_gradients_are_needed(
    kind, message, accumulate_grad_batches
):
    with pytest.raises(MisconfigurationException, match=message):
        fit(kind(UPGrad()), make_batches(3), accumulate_grad_batches=accumulate_grad_batches)
    with pytest.raises(MisconfigurationException, match=message):
        fit(kind(), make_batches(3), callbacks=[Availability(request_at=[0])])


def test_a_training_step_with_another_loss_is_plain_lightning_otherwise():
    class PlainWithPenalty(PlainNet):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.1 * self.backbone[0].weight.square().sum()

    module, plain = WithPenalty(), PlainWithPenalty()
    fit(module, make_batches(3))
    fit(plain, make_batches(3))
    assert_same_parameters(module, plain)


def test_a_training_step_may_return_a_dictionary():
    module, reference = WithDictionary(UPGrad()), Net(UPGrad())
    fit(module, make_batches(3), accumulate_grad_batches=3)
    fit(reference, make_batches(3), accumulate_grad_batches=3)
    assert_same_parameters(module, reference)


def test_gradients_that_were_never_aggregated_are_noticed():
    class Silent(Net):
        def on_before_optimizer_step(self, optimizer):
            pass

    with pytest.raises(
        MisconfigurationException, match=r"did not call `super\(\).on_before_optimizer_step\(optimizer\)`"
    ):
        fit(Silent(UPGrad()), make_batches(2))


class EverySecondStep(Net):
    """Skips the last micro-batch of each window of two."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else loss


def test_a_window_whose_last_batch_is_skipped_is_aggregated():
    batches = make_batches(8)
    skipping, halved = EverySecondStep(UPGrad()), Net(UPGrad())
    halved.scales = dict.fromkeys(TASKS, 0.5)
    fit(skipping, batches, accumulate_grad_batches=2)
    fit(halved, batches[::2])
    assert_same_parameters(skipping, halved, atol=1e-6)


class EndsEpochsEarly(Net):
    """After five batches, in the middle of a window of four."""

    def on_train_batch_start(self, batch, batch_idx):
        engine_of(self).step.wants_batches = True
        return -1 if batch_idx == 5 else None


class Windows(L.Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append([record.batch_idx for record in engine_of(pl_module).step.batches])


def test_an_abandoned_window_does_not_leak_into_the_next():
    windows = Windows()
    fit(EndsEpochsEarly(UPGrad()), make_batches(8), callbacks=[windows], accumulate_grad_batches=4, max_epochs=2)
    assert windows.seen == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_reduce_dtype_is_checked():
    module = Net(UPGrad())
    module.reduce_dtype = "bf16"
    with pytest.raises(MisconfigurationException, match="`reduce_dtype` of Net must be a floating"):
        fit(module, make_batches(1))


def test_manual_optimization_is_refused():
    module = Net(UPGrad())
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="needs automatic optimization"):
        fit(module, make_batches(2))


# --- State -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, UPGrad()])
def test_checkpoints_have_the_keys_of_plain_lightning(method, tmp_path):
    states = []
    for net in (Net(method), PlainNet()):
        callback = ModelCheckpoint(tmp_path / type(net).__name__)
        fit(net, make_batches(3), enable_checkpointing=True, callbacks=[callback])
        states.append(torch.load(callback.best_model_path, weights_only=True)["state_dict"])
    assert list(states[0]) == list(states[1])
    PlainNet().load_state_dict(states[0], strict=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("method", [None, UPGrad(), scalarization.UW(3)])
@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_goes_on_as_the_original(duplicate, method, trained):
    original = Net(copy.deepcopy(method))
    if trained:
        fit(original, make_batches(3))
    other = duplicate(original)
    assert_same_parameters(other, original)
    untouched = duplicate(original)
    fit(other, make_batches(3, seed=1))
    assert_same_parameters(original, untouched)
    fit(original, make_batches(3, seed=1))
    assert_same_parameters(other, original)
    assert_moved(other)


class CopyInHooks(L.Callback):
    """Copies the module wherever callbacks that average weights do."""

    def __init__(self):
        self.copies = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.copies.append(copy.deepcopy(pl_module))

    on_before_optimizer_step = on_before_zero_grad

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.copies.append(copy.deepcopy(pl_module))


def test_the_module_can_be_copied_during_a_step():
    callback = CopyInHooks()
    fit(Net(UPGrad()), make_batches(2), callbacks=[callback])
    assert len(callback.copies) == 6


def test_a_run_that_resumes_equals_one_that_was_not_interrupted(tmp_path):
    nets = [Net(UPGrad()) for _ in range(3)]
    for net in nets:
        net.make_optimizer = functools.partial(torch.optim.Adam, lr=0.01)
    whole, half, resumed = nets
    fit(whole, make_batches(4), max_epochs=4)
    fit(half, make_batches(4), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, make_batches(4), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_moved(resumed)
    assert_same_parameters(resumed, whole)


class Base(PlainNet):
    """A base class with hooks of its own, which the mixin must not hide."""

    called: list[str]

    def on_fit_start(self) -> None:
        self.called = ["on_fit_start"]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.called.append("on_before_optimizer_step")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.called.append("on_save_checkpoint")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.called.append("on_load_checkpoint")

    def teardown(self, stage: str) -> None:
        self.called.append("teardown")


class Mixed(MultiTaskMixin, Base):
    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        return self.losses(batch)


def test_hooks_of_a_base_class_are_called() -> None:
    module = Mixed()
    trainer = fit(module, make_batches(1))
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    assert module.called == [
        "on_fit_start",
        "on_before_optimizer_step",
        "teardown",
        "on_save_checkpoint",
        "on_load_checkpoint",
    ]
    assert trainer.global_step == 1
