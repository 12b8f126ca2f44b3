"""Task gradients: their figures against float64, their rows against ``torch.autograd.grad`` of each loss."""

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchjd.aggregation import Mean, Sum, UPGrad
from torchjd.scalarization import UW, Constant

from lightning_cost import MultiTaskMixin, TaskGradients
from lightning_cost._training.shared import shared_modules, shared_parameters
from tests.support.nets import TASKS, Net, fit, make_batches, make_mlp

# --- Figures of a matrix ---------------------------------------------------------------------------------------------


@st.composite
def matrices(draw):
    """Rows of very different lengths, some of them zero."""
    num_tasks, num_parameters = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponents = draw(st.lists(st.integers(-6, 6), min_size=num_tasks, max_size=num_tasks))
    present = draw(st.lists(st.booleans(), min_size=num_tasks, max_size=num_tasks))
    matrix = generator.standard_normal((num_tasks, num_parameters))
    return (matrix * 10.0 ** np.array(exponents)[:, None] * np.array(present)[:, None]).astype(np.float32)


def safe_ratio(numerator, denominator):
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


@given(matrices())
@settings(deadline=None)
def test_figures_equal_those_of_numpy_in_float64(matrix):
    gradients = TaskGradients([f"task{i}" for i in range(len(matrix))], torch.from_numpy(matrix))
    rows = matrix.astype(np.float64)
    mean, norms = rows.mean(axis=0), np.linalg.norm(rows, axis=1)
    products, lengths = rows @ rows.T, np.outer(norms, norms)
    # float32 knows each element of the mean up to its rounding of the longest row.
    rounding = 1e-6 * norms.max()

    assert (np.abs(gradients.gramian.numpy() - products) <= 1e-5 * lengths).all()
    np.testing.assert_allclose(gradients.norms, norms, rtol=1e-5)
    np.testing.assert_allclose(gradients.mean, mean, rtol=0, atol=rounding)
    np.testing.assert_allclose(gradients.mean_norm, np.linalg.norm(mean), rtol=1e-5, atol=rounding)
    np.testing.assert_allclose(gradients.pairwise_cosines, safe_ratio(products, lengths), rtol=0, atol=1e-5)
    cosines = safe_ratio(rows @ mean, norms * np.linalg.norm(mean))
    tolerance = 1e-5 + safe_ratio(2 * rounding, np.linalg.norm(mean))
    np.testing.assert_allclose(gradients.cosines, cosines, rtol=0, atol=tolerance)
    for cosine in (gradients.cosines, gradients.pairwise_cosines):
        assert cosine.abs().max() <= 1
        assert (cosine[norms == 0] == 0).all()


@pytest.mark.parametrize("num_parameters", [2, 1000, 100_000])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_cosines_with_the_mean_survive_that_the_tasks_nearly_cancel(num_parameters, distance):
    generator = torch.Generator().manual_seed(0)
    row, change = torch.randn(2, num_parameters, generator=generator)
    gradients = TaskGradients(["left", "right"], torch.stack([row, -row + distance * change]))
    rows = gradients.matrix.double()
    mean = rows.mean(dim=0)
    cosines = rows @ mean / (rows.norm(dim=1) * mean.norm())
    torch.testing.assert_close(gradients.cosines.double(), cosines, rtol=0, atol=5e-5)
    torch.testing.assert_close(gradients.mean_norm.double(), mean.norm(), rtol=5e-5, atol=0)


def test_figures_of_a_matrix_by_hand():
    gradients = TaskGradients(["a", "b", "c"], torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, -3.0]]))
    assert gradients.gramian.tolist() == [[9, 0, 0], [0, 0, 0], [0, 0, 9]]
    assert gradients.norms.tolist() == [3, 0, 3]
    assert gradients.mean.tolist() == [1, -1]
    assert gradients.mean_norm.item() == pytest.approx(2**0.5)
    assert gradients.cosines.tolist() == pytest.approx([0.5**0.5, 0, 0.5**0.5])
    assert gradients.pairwise_cosines.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_a_clone_keeps_what_the_next_step_overwrites():
    gradients = TaskGradients(["left", "right"], torch.eye(2))
    copy = gradients.clone()
    gradients.matrix.zero_()
    assert copy.names == ("left", "right")
    assert copy.norms.tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(3, 4), (2,), (2, 2, 2)])
def test_a_matrix_without_a_row_for_each_task_is_refused(shape):
    with pytest.raises(ValueError, match=r"`matrix` must have shape .* with 2 rows.*\['left', 'right'\].*got shape"):
        TaskGradients(["left", "right"], torch.zeros(shape))


# --- Rows of a training step -----------------------------------------------------------------------------------------


class Watched(MultiTaskMixin):
    """Differentiates every task loss on the graph of the step, and keeps these rows and those of the mixin."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.expected, self.actual = [], []
        self.sum = 0

    def task_losses(self, batch, batch_idx):
        self.by_task = super().task_losses(batch, batch_idx)
        return self.by_task

    def backward(self, loss, *args, **kwargs):
        shared, rows = shared_parameters(self), []
        for task_loss in self.by_task.values():
            pieces = torch.autograd.grad(task_loss, shared, retain_graph=True, allow_unused=True)
            pieces = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(shared, pieces, strict=True)]
            rows.append(torch.cat([piece.flatten() for piece in pieces]))
        self.sum = self.sum + torch.stack(rows) / self.trainer.accumulate_grad_batches
        super().backward(loss, *args, **kwargs)
        if self.task_gradients is None:
            self.sum = 0

    def on_before_optimizer_step(self, optimizer):
        assert self.task_gradients is not None
        self.expected.append(self.sum)
        self.actual.append(self.task_gradients.matrix.clone())
        self.sum = 0
        super().on_before_optimizer_step(optimizer)


class WatchedNet(Watched, Net):
    """The rows of :class:`Net`; ``request`` tells at which batches to ask for them."""

    def __init__(self, *args, request=lambda batch_idx: False, **kwargs):
        super().__init__(*args, **kwargs)
        self.request = request

    def on_train_batch_start(self, batch, batch_idx):
        if self.request(batch_idx):
            self.request_task_gradients()


def assert_rows(module, steps, rtol=1e-5):
    """Every row of every step, relative to its own length; zero rows exactly."""
    assert len(module.actual) == len(module.expected) == steps
    for actual, expected in zip(module.actual, module.expected, strict=True):
        assert actual.shape == expected.shape
        error, length = (actual - expected).norm(dim=1), expected.norm(dim=1)
        assert (error <= rtol * length).all(), (error / length).tolist()


METHODS = {
    "aggregator": lambda num_tasks: UPGrad(),
    "mean": lambda num_tasks: None,
    "constant": lambda num_tasks: Constant(torch.arange(1.0, 1 + num_tasks)),
    "learned": UW,
}


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_rows_are_the_gradients_of_each_loss(method, num_tasks):
    tasks = [f"task{i}" for i in range(num_tasks)]
    module = WatchedNet(METHODS[method](num_tasks), tasks, request=lambda batch_idx: True)
    fit(module, make_batches(6, tasks))
    assert_rows(module, steps=6)
    assert module.task_gradients.names == tuple(tasks)


@pytest.mark.parametrize(
    ("method", "calls"), [("aggregator", [3, 2, 2, 2]), ("mean", [3, 2, 2, 2]), ("learned", [3, 3, 3, 3])]
)
def test_one_row_is_had_by_subtraction_where_the_loss_weighs_the_tasks_equally(method, calls, differentiations):
    module, seen = Net(METHODS[method](3)), []
    module.on_train_batch_start = lambda batch, batch_idx: module.request_task_gradients()

    class Count(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            seen.append(len(differentiations))
            differentiations.clear()

    fit(module, make_batches(4), callbacks=[Count()])
    assert seen == calls


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_accumulated_batches_the_last_window_incomplete(method):
    module = WatchedNet(METHODS[method](3), request=lambda batch_idx: True)
    fit(module, make_batches(10), accumulate_grad_batches=4, max_epochs=2)
    assert_rows(module, steps=6)


@pytest.mark.parametrize("method", ["mean", "learned"])
def test_rows_asked_for_between_micro_batches_hold_those_from_there_on(method):
    module = WatchedNet(METHODS[method](3), request=lambda batch_idx: batch_idx % 4 == 2)
    fit(module, make_batches(12), accumulate_grad_batches=4)
    assert_rows(module, steps=3)


@pytest.mark.parametrize("scales", [(1e5, 1.0, 1e-5), (1.0, 1e5, 1.0), (1e-5, 1e-5, 1.0)])
@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_rows_of_badly_scaled_tasks(scales, accumulate_grad_batches):
    module = WatchedNet(UPGrad(), scales=scales)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-7)
    fit(module, make_batches(6), accumulate_grad_batches=accumulate_grad_batches)
    assert_rows(module, steps=6 // accumulate_grad_batches)


class SwingingNet(WatchedNet):
    """Multiplies the loss of the first task by ``swing`` at every other batch."""

    swing = 1.0

    def losses(self, batch, features=None):
        losses = super().losses(batch, features)
        return losses | {"left": losses["left"] * self.swing} if batch["odd"] else losses


def swinging_batches(count, **settings):
    return [batch | {"odd": index % 2 == 1} for index, batch in enumerate(make_batches(count, **settings))]


@pytest.mark.parametrize("tasks", [("left", "right"), TASKS, ("left", "a", "b", "c", "d")])
@pytest.mark.parametrize("scale", [10.0, 0.1])
@pytest.mark.parametrize("method", ["aggregator", "mean"])
def test_a_task_whose_gradient_vanishes_in_a_batch_has_a_row_of_zeros(tasks, scale, method):
    module = SwingingNet(
        METHODS[method](len(tasks)), tasks, [scale] + [1.0] * (len(tasks) - 1), request=lambda batch_idx: True
    )
    module.swing = 0.0
    fit(module, swinging_batches(6, tasks=tasks))
    assert_rows(module, steps=6)
    assert [bool(rows[0].any()) for rows in module.actual] == [True, False] * 3


def make_conv_net(channels):
    layers = [nn.Unflatten(1, (5, 1, 1)), nn.Upsample(8)]
    for inputs, outputs in ((5, channels), (channels, channels), (channels, channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def test_a_vanishing_gradient_leaves_no_rounding_in_a_deep_network():
    module = SwingingNet(UPGrad(), scales=[10.0, 1.0, 1.0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module.backbone = make_conv_net(32)
    module.swing = 0.0
    fit(module, swinging_batches(6, size=32))
    assert [bool(rows[0].any()) for rows in module.actual] == [True, False] * 3


def test_a_vanishing_gradient_leaves_no_rounding_in_half_precision():
    module = SwingingNet(UPGrad(), scales=[10.0, 1.0, 1.0])
    module.swing = 0.0
    fit(module, swinging_batches(6), precision="bf16-mixed")
    assert [bool(rows[0].any()) for rows in module.actual] == [True, False] * 3


@pytest.mark.parametrize("swing", [1e-3, 1e-5])
def test_rows_of_a_task_whose_scale_changes_from_batch_to_batch(swing):
    module = SwingingNet(UPGrad(), scales=[1 / swing, 1.0, 1.0])
    module.swing = swing
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-7)
    fit(module, swinging_batches(6))
    assert_rows(module, steps=6)


def test_rows_where_the_optimizer_does_not_know_a_shared_parameter():
    module = WatchedNet(UPGrad())
    known = [module.backbone[0].weight, *module.heads.parameters()]
    module.configure_optimizers = lambda: torch.optim.SGD(known, lr=0.05)
    fit(module, make_batches(5))
    assert_rows(module, steps=5)


def test_rows_where_gradients_are_cleared_by_zeros():
    module = WatchedNet(UPGrad())
    module.optimizer_zero_grad = lambda epoch, batch_idx, optimizer: optimizer.zero_grad(set_to_none=False)
    fit(module, make_batches(8), accumulate_grad_batches=2)
    assert_rows(module, steps=4)


class StopOnce(L.Callback):
    """Ends the first run in the middle of an accumulation window, or with an error between backward and step."""

    def __init__(self, error):
        self.error = error

    def on_after_backward(self, trainer, pl_module):
        if self.error:
            raise RuntimeError("interrupted")
        trainer.should_stop = True


@pytest.mark.parametrize("error", [True, False])
def test_rows_after_an_interrupted_run_hold_nothing_of_it(error):
    module = WatchedNet(UPGrad())
    interrupted = {"accumulate_grad_batches": 4, "callbacks": [StopOnce(error)]}
    if error:
        with pytest.raises(RuntimeError, match="interrupted"):
            fit(module, make_batches(8), **interrupted)
    else:
        fit(module, make_batches(8), **interrupted)
    assert module.actual == []
    module.sum = 0
    fit(module, make_batches(4, seed=1))
    assert_rows(module, steps=4)


def test_rows_live_in_one_buffer():
    module, addresses = Net(UPGrad()), set()

    class Address(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            addresses.add(pl_module.task_gradients.matrix.data_ptr())

    fit(module, make_batches(4), callbacks=[Address()])
    assert len(addresses) == 1


def test_one_forward_a_step():
    module, forwards = Net(UPGrad()), []
    module.backbone.register_forward_hook(lambda *args: forwards.append(1))
    fit(module, make_batches(5))
    assert len(forwards) == 5


# --- Rows of all kinds of models -------------------------------------------------------------------------------------


class BackboneNet(WatchedNet):
    """Any backbone from 5 inputs to 4 features."""

    def __init__(self, backbone, shared_module="backbone"):
        super().__init__(UPGrad())
        self.backbone = backbone
        self.shared_module = shared_module


class Twice(nn.Module):
    """Uses one layer two times, and a scalar parameter."""

    def __init__(self):
        super().__init__()
        self.input, self.layer = nn.Linear(5, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.layer(self.layer(self.input(x)).tanh() * self.gain)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(1, 4, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.gru(x[:, :, None])[0][:, -1]


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.body, self.use_reentrant = make_mlp(5, 6, 4), use_reentrant

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


class Bagged(nn.Module):
    """Averages embeddings of which a batch uses only some."""

    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(20, 4, sparse=sparse)
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.table(x.abs().mul(4).long().clamp_max(19)).mean(dim=1))


class MixedPrecision(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Linear(5, 6).bfloat16(), nn.Linear(6, 4).double()

    def forward(self, x):
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
def test_rows_of_every_kind_of_backbone(name, accumulate_grad_batches):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = BackboneNet(BACKBONES[name]())
        fit(module, make_batches(6, size=32), accumulate_grad_batches=accumulate_grad_batches)
    assert_rows(module, steps=6 // accumulate_grad_batches)


def test_rows_of_parameters_of_several_types_have_the_widest():
    module = BackboneNet(MixedPrecision())
    fit(module, make_batches(1))
    assert_rows(module, steps=1)
    assert module.actual[0].dtype == torch.float64


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.float32), ("64-true", torch.float64)])
def test_rows_have_at_least_single_precision(precision, dtype):
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float64
    batches = [{name: tensor.to(kind) for name, tensor in batch.items()} for batch in make_batches(4)]
    module = WatchedNet(UPGrad())
    fit(module, batches, precision=precision)
    assert {parameter.dtype for parameter in module.parameters()} == {kind}
    assert {rows.dtype for rows in module.actual} == {dtype}
    module.expected = [rows.to(dtype) for rows in module.expected]
    assert_rows(module, steps=4, rtol=0.03 if precision == "bf16-true" else 1e-12)


def test_rows_of_several_modules_by_dotted_paths():
    module = BackboneNet(make_mlp(5, 6, 6, 4), shared_module=["backbone.4", "backbone.0", "backbone.4"])
    fit(module, make_batches(4))
    assert_rows(module, steps=4)
    assert list(shared_modules(module)) == ["backbone.4", "backbone.0"]
    shared = [*module.backbone[4].parameters(), *module.backbone[0].parameters()]
    assert list(map(id, shared_parameters(module))) == list(map(id, shared))
    assert module.actual[0].shape == (3, 6 * 4 + 4 + 5 * 6 + 6)


def test_rows_of_a_weight_tied_to_a_head():
    class Tied(WatchedNet):
        def __init__(self):
            super().__init__(UPGrad())
            self.backbone = make_mlp(5, 4, 4)
            self.extra = nn.Linear(4, 4, bias=False)
            self.extra.weight = self.backbone[2].weight

        def losses(self, batch, features=None):
            features = self.features(batch)
            return super().losses(batch, features) | {"ink": self.extra(features).square().mean()}

    module = Tied()
    fit(module, make_batches(5))
    assert_rows(module, steps=5)
    assert module.actual[0].shape == (3, 5 * 4 + 4 + 4 * 4 + 4)


def test_a_task_has_zeros_for_shared_parameters_that_it_does_not_touch():
    class Branches(WatchedNet):
        shared_module = ("backbone", "second")

        def __init__(self):
            super().__init__(UPGrad())
            self.second = make_mlp(5, 4)

        def losses(self, batch, features=None):
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


def test_a_task_that_touches_other_parameters_from_batch_to_batch_keeps_nothing_of_the_last():
    class Alternating(WatchedNet):
        shared_module = ("backbone", "second")

        def __init__(self):
            super().__init__(UPGrad())
            self.second = make_mlp(5, 4)

        def losses(self, batch, features=None):
            features = self.second(batch["x"]) if batch["odd"] else self.features(batch)
            return super().losses(batch) | {"ink": self.heads["ink"](features).square().mean()}

    module = Alternating()
    fit(module, swinging_batches(6))
    assert_rows(module, steps=6)
    first = sum(parameter.numel() for parameter in module.backbone.parameters())
    assert [bool(rows[2, first:].any()) for rows in module.expected] == [False, True] * 3


def test_rows_leave_out_frozen_parameters_and_follow_when_they_are_unfrozen():
    class Finetuned(WatchedNet):
        def configure_optimizers(self):
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


@pytest.mark.parametrize("detach_from", [0, 3])
def test_a_task_without_gradient_is_named(detach_from):
    class Detached(Net):
        def task_losses(self, batch, batch_idx):
            features = self.features(batch)
            if batch_idx >= detach_from:
                features = features.detach()
            return self.losses(batch) | {"right": self.losses(batch, features)["right"]}

    with pytest.raises(RuntimeError, match="loss of task 'right' has no gradient with respect to the shared"):
        fit(Detached(Mean()), make_batches(6))


def test_a_constant_loss_is_named_in_a_step_that_would_derive_its_row():
    class Constants(Net):
        def task_losses(self, batch, batch_idx):
            losses = self.losses(batch)
            return losses | {"left": losses["left"].detach()} if batch_idx == 2 else losses

    with pytest.raises(RuntimeError, match="loss of task 'left' has no gradient"):
        fit(Constants(Sum(), scales=[100.0, 1.0, 1.0]), make_batches(6))


def test_reentrant_checkpointing_is_named_as_a_cause():
    module = BackboneNet(Checkpointed(use_reentrant=True))
    batches = [batch | {"x": batch["x"].requires_grad_()} for batch in make_batches(2)]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        fit(module, batches)
