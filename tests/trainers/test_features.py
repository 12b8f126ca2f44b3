"""Aggregating the gradients of the features, and reusing task weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchjd.aggregation import MGDA, ConFIG, FairGrad, GradDrop, Mean, NashMTL, PCGrad, Sum, UPGrad
from torchjd.scalarization import UW

from lightning_cost import SymmetryTeleportCallback
from tests.support.nets import TASKS, Batch, Net, Seeds, assert_same_parameters, fit, grads_of, make_batches, make_mlp
from tests.support.teleporting import NoisyNet, assert_same, teleporter

WEIGHTED = {"UPGrad": UPGrad, "MGDA": MGDA, "PCGrad": PCGrad, "FairGrad": partial(FairGrad, 1.0), "Sum": Sum}


class FeatureNet(Net):
    task_gradients_of = "features"


class Grads(L.Callback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.steps.append(grads_of(pl_module))


def reference(module: Net, batch: Batch, aggregate: Any) -> list[Tensor]:
    """Gradients by the chain rule, in the order of the parameters."""
    features = module.backbone(batch["x"])
    cut = features.detach().requires_grad_()
    losses = [
        module.scales[task] * (head(cut.tanh()) - batch[task]).square().mean() for task, head in module.heads.items()
    ]
    rows = torch.stack([torch.autograd.grad(loss, cut, retain_graph=True)[0].reshape(-1) for loss in losses])
    shared = torch.autograd.grad(features, list(module.backbone.parameters()), aggregate(rows).view_as(features))
    heads = torch.autograd.grad(torch.stack(losses).sum(), list(module.heads.parameters()))
    return [*shared, *heads]


@pytest.mark.parametrize("method", [*WEIGHTED.values(), ConFIG, partial(NashMTL, 3), Mean], ids=str)
@pytest.mark.parametrize("scales", [None, [1.0, 0.05, 0.01]])
def test_gradients_are_those_of_the_chain_rule(method: Any, scales: Any) -> None:
    grads, (batch,) = Grads(), make_batches(1)
    expected = reference(Net(scales=scales), batch, method())
    fit(FeatureNet(method(), scales=scales), [batch], callbacks=[grads])
    torch.testing.assert_close(grads.steps[0], expected, rtol=1e-4, atol=1e-6)


def test_graddrop_drops_features() -> None:
    grads, (batch,) = Grads(), make_batches(1)
    fit(FeatureNet(GradDrop()), [batch], callbacks=[grads, Seeds()])
    torch.manual_seed(0)
    expected = reference(Net(), batch, GradDrop())
    torch.testing.assert_close(grads.steps[0], expected, rtol=1e-4, atol=1e-6)


def test_with_the_sum_it_is_the_gradient_of_the_sum() -> None:
    runs = []
    for kind in (Net, FeatureNet):
        module = kind(Sum())
        fit(module, make_batches(8), max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.1)
        runs.append(module)
    assert_same_parameters(runs[1], runs[0], atol=1e-6)


def test_micro_batches_are_aggregated_one_by_one() -> None:
    grads, batches = Grads(), make_batches(2)
    fit(FeatureNet(UPGrad()), batches, callbacks=[grads], accumulate_grad_batches=2)
    both = [reference(Net(), batch, UPGrad()) for batch in batches]
    expected = [(one + two) / 2 for one, two in zip(*both, strict=True)]
    torch.testing.assert_close(grads.steps[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(precision: Any) -> None:
    grads, (batch,) = Grads(), make_batches(1)
    expected = reference(Net(), batch, UPGrad())
    if precision == "64-true":
        batch = {name: value.double() for name, value in batch.items()}
    fit(FeatureNet(UPGrad()), [batch], callbacks=[grads], precision=precision)
    loose = {"rtol": 0.1, "atol": 0.02} if precision == "bf16-mixed" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close([grad.float() for grad in grads.steps[0]], expected, **loose)


class Branches(FeatureNet):
    """Two shared modules, one after the other; the features are a tensor and a dictionary of tensors."""

    shared_module = ("stem", "backbone")

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method)
        self.stem, self.backbone = make_mlp(5, 6), Fork()

    def losses(self, batch: Batch, features: Any = None) -> dict[str, Tensor]:
        out = self.backbone(self.stem(batch["x"]))
        mixed = {"left": out[0], "right": out[1]["b"], "ink": out[0] + out[1]["b"]}
        return {task: (self.heads[task](mixed[task].tanh()) - batch[task]).square().mean() for task in TASKS}


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = make_mlp(6, 4), make_mlp(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.one(x), {"b": self.two(x), "count": torch.tensor(2)}


def test_features_may_be_several_tensors_behind_several_modules() -> None:
    (batch,), grads = make_batches(1), Grads()
    plain = Branches()
    plain.task_gradients_of = "parameters"
    stem = plain.stem(batch["x"])
    one, two = plain.backbone.one(stem), plain.backbone.two(stem)
    mixed = {"left": one, "right": two, "ink": one + two}
    losses = {task: (plain.heads[task](mixed[task].tanh()) - batch[task]).square().mean() for task in TASKS}
    rows = [torch.autograd.grad(x, (one, two), retain_graph=True, materialize_grads=True) for x in losses.values()]
    matrix = torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])
    merged = [piece.view_as(one) for piece in UPGrad()(matrix).chunk(2)]
    shared = [*plain.stem.parameters(), *plain.backbone.parameters()]
    expected = torch.autograd.grad((one, two), shared, merged)
    module = Branches(UPGrad())

    class Check(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            found = [p.grad for p in (*pl_module.stem.parameters(), *pl_module.backbone.parameters())]
            torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-6)
            grads.steps.append([])

    fit(module, [batch], callbacks=[Check()])
    assert grads.steps


class Bypass(FeatureNet):
    def losses(self, batch: Batch, features: Any = None) -> dict[str, Tensor]:
        losses = super().losses(batch)
        losses["ink"] = losses["ink"] + self.backbone[0].weight.square().sum()
        return losses


class Inside(FeatureNet):
    def features(self, batch: Batch) -> Tensor:
        return self.backbone.forward(batch["x"])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Bypass(UPGrad()), r"loss of task 'ink' reaches the shared parameter `backbone.0.weight` by another way"),
        (Inside(UPGrad()), r"`task_losses` of Inside did not call it"),
        (FeatureNet(), r"`task_gradients_of='features'` of FeatureNet has no effect with `mtl_method=None`"),
        (FeatureNet(UW(3)), r"`task_gradients_of='features'` of FeatureNet has no effect with `mtl_method=UW"),
    ],
)
def test_what_cannot_be_is_refused(module: Net, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, make_batches(1))


@pytest.mark.parametrize("reevaluate", [True, False])
@pytest.mark.parametrize("options", [{"task_gradients_of": "features"}, {"weights_every": 3}], ids=str)
def test_teleports_look_at_the_parameters_and_the_update_at_the_option(options: Any, reevaluate: bool) -> None:
    class Check(L.Callback):
        """Task gradients are of the parameters; `.grad` of the heads is that of the summed loss."""

        seen = 0

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            if callback.reports[-1].accepted and not reevaluate:
                return
            losses = pl_module.losses(batches[trainer.global_step])
            shared, heads = list(pl_module.backbone.parameters()), list(pl_module.heads.parameters())
            rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses.values()]
            matrix = torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])
            torch.testing.assert_close(pl_module.task_gradients.matrix, matrix, rtol=1e-4, atol=1e-5)
            expected = torch.autograd.grad(torch.stack(list(losses.values())).sum(), heads)
            torch.testing.assert_close([p.grad for p in heads], list(expected), rtol=1e-4, atol=1e-5)
            if "task_gradients_of" in options:
                expected_grads = reference(pl_module, batches[trainer.global_step], UPGrad())
                torch.testing.assert_close(grads_of(pl_module), expected_grads, rtol=1e-3, atol=1e-5)
            self.seen += 1

    batches, callback, check, module = make_batches(6), teleporter(reevaluate=reevaluate), Check(), Net(UPGrad())
    for name, value in options.items():
        setattr(module, name, value)
    fit(module, batches, callbacks=[callback, check])
    assert any(report.accepted for report in callback.reports)
    assert check.seen or not reevaluate


# ----------------------------------------------------------------------------------------------------- reused weights


def weights_of(method: Any, matrix: Tensor) -> Tensor:
    return method.weighting(matrix) if isinstance(method, Sum) else method.gramian_weighting(matrix @ matrix.T)


@pytest.mark.parametrize("method", [WEIGHTED[name] for name in ("UPGrad", "MGDA", "FairGrad", "Sum")], ids=str)
def test_reused_weights_weigh_the_shared_parameters_only(method: Any) -> None:
    class Check(L.Callback):
        weights: Any = None
        seen = 0

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            losses = list(pl_module.losses(batches[trainer.global_step]).values())
            shared, heads = list(pl_module.backbone.parameters()), list(pl_module.heads.parameters())
            rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
            matrix = torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])
            if trainer.global_step % 3 == 0:
                self.weights = weights_of(method(), matrix)
            expected = self.weights @ matrix
            found = torch.cat([p.grad.reshape(-1) for p in shared])
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
            of_heads = torch.autograd.grad(torch.stack(losses).sum(), heads)
            torch.testing.assert_close([p.grad for p in heads], list(of_heads), rtol=1e-4, atol=1e-5)
            assert (pl_module.task_gradients is None) == (trainer.global_step % 3 != 0)
            self.seen += 1

    torch.manual_seed(0)
    batches, check, module = make_batches(7), Check(), Net(method(), scales=[1.0, 0.3, 0.1])
    module.weights_every = 3
    fit(module, batches, callbacks=[check])
    assert check.seen == 7


@pytest.mark.parametrize("of", ["parameters", "features"])
def test_every_step_is_exact_and_every_second_one_is_not(of: Any) -> None:
    runs = {}
    for name, every in (("default", None), ("one", 1), ("two", 2)):
        module = NoisyNet(UPGrad(), TASKS)
        module.task_gradients_of = of
        if every:
            module.weights_every = every
        torch.manual_seed(0)
        fit(module, make_batches(8), max_epochs=2)
        runs[name] = dict(module.state_dict())
    assert_same(runs["one"], runs["default"])
    assert not torch.equal(runs["two"]["backbone.0.0.weight"], runs["one"]["backbone.0.0.weight"])


@pytest.mark.parametrize("of", ["parameters", "features"])
def test_a_resumed_run_continues_between_two_sets_of_weights(of: Any, tmp_path: Any) -> None:
    def make(callbacks: Any = (), ckpt: Any = None, epochs: int = 4) -> dict[str, Tensor]:
        module = Net(UPGrad())
        module.task_gradients_of, module.weights_every = of, 3
        fit(module, make_batches(4), callbacks=list(callbacks), max_epochs=epochs, ckpt_path=ckpt)
        return dict(module.state_dict())

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole = make([Save()])
    for epoch in range(3):
        assert_same(make(ckpt=tmp_path / f"{epoch}.ckpt"), whole)


def test_logged_losses_are_the_same_sum() -> None:
    class Logged(L.Callback):
        def __init__(self) -> None:
            self.totals: list[tuple[float, float]] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            metrics = trainer.callback_metrics
            parts = sum(metrics[f"train/{task}_loss"].item() for task in TASKS)
            self.totals.append((metrics["train/loss"].item(), parts))

    for options in ({"weights_every": 3}, {"task_gradients_of": "features"}):
        logged, module = Logged(), Net(UPGrad())
        for name, value in options.items():
            setattr(module, name, value)
        fit(module, make_batches(4), callbacks=[logged], logger=False)
        for total, parts in logged.totals:
            assert total == pytest.approx(parts, rel=1e-5)


def test_a_check_may_be_due_in_a_step_that_reuses_weights() -> None:
    module, callback = Net(UPGrad()), SymmetryTeleportCallback(trigger="any", start_epoch=0, reevaluate=False)
    module.weights_every = 4
    fit(module, make_batches(8), callbacks=[callback], max_epochs=2)
    assert {report.step % 4 for report in callback.reports} - {0}
