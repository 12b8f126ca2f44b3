"""Methods that scalarize train as they do in a plain loop, and methods that cannot work are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.testing import assert_close
from torchjd import aggregation
from torchjd.aggregation import CRMOGMWeighting, GramianWeightedAggregator, MoDoWeighting, SDMGradWeighting, UPGrad
from torchjd.scalarization import DWA, FAMO, IMTLL, STCH, UW, GeometricMean, Random, Scalarizer

from lightning_cost import MultiTaskMixin, ScaleInvariant
from tests.support.nets import Net, PlainNet, Seeds, assert_same_parameters, fit, make_batches
from tests.support.teleporting import NoisyNet


@pytest.mark.parametrize("method", ["UPGrad", UPGrad, sum, aggregation.UPGradWeighting(), 3])
def test_a_wrong_method_is_refused(method: Any) -> None:
    with pytest.raises(MisconfigurationException, match="`mtl_method` must be a torchjd"):
        fit(Net(method), make_batches(1))


def test_a_method_that_is_not_set_is_the_mean() -> None:
    class Bare(MultiTaskMixin, PlainNet):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            return self.losses(batch)

    module, plain = Bare(), PlainNet()
    fit(module, make_batches(3))
    fit(plain, make_batches(3))
    assert_same_parameters(module, plain)


EPOCHS = 3


BATCHES = 5


SCALARIZERS: dict[str, Callable[[], Scalarizer]] = {
    "SI": ScaleInvariant,
    "RLW": Random,
    "DWA": DWA,
    "UW": partial(UW, 3),
    "IMTL-L": partial(IMTLL, 3),
    "FAMO": partial(FAMO, 3, lr=0.3),
    "geometric mean": GeometricMean,
    "STCH": partial(STCH, 0.5),
}


def plain_loop(method: Scalarizer, net: NoisyNet, batches: list[Any], accumulated: int) -> None:
    """The examples in TorchJD's documentation, with random numbers and running statistics looked after by hand."""
    parameters = [*net.backbone.parameters(), *net.heads.parameters()]
    if not isinstance(method, FAMO):
        parameters += method.parameters()
    optimizer = torch.optim.Adam(parameters, lr=2e-2)

    def losses(index: int) -> Tensor:
        torch.manual_seed(index)
        return torch.stack(list(net.losses(batches[index]).values()))

    for _ in range(EPOCHS):
        for window in torch.arange(len(batches)).split(accumulated):
            before = []
            optimizer.zero_grad()
            for index in window.tolist():
                values = losses(index)
                before.append(values.detach())
                (method(values) / accumulated).backward()
            optimizer.step()
            if isinstance(method, FAMO):
                buffers = [buffer.clone() for buffer in net.backbone.buffers()]
                after = [losses(index).detach() for index in window.tolist()]
                for buffer, value in zip(net.backbone.buffers(), buffers, strict=True):
                    buffer.copy_(value)
                method(torch.stack(before).mean(dim=0))
                method.update(torch.stack(after).mean(dim=0))
        if isinstance(method, DWA):
            method.step()


@pytest.mark.parametrize(
    ("name", "accumulated"), [*((name, 1) for name in SCALARIZERS), ("DWA", 2), ("FAMO", 2), ("RLW", 2), ("SI", 2)]
)
def test_training_is_that_of_a_plain_loop(name: str, accumulated: int) -> None:
    batches = make_batches(BATCHES)
    module, net, method = NoisyNet(SCALARIZERS[name]()), NoisyNet(), SCALARIZERS[name]()
    module.make_optimizer = partial(torch.optim.Adam, lr=2e-2)
    fit(module, batches, max_epochs=EPOCHS, accumulate_grad_batches=accumulated, callbacks=[Seeds()])
    net.train()
    plain_loop(method, net, batches, accumulated)
    net.mtl_method = method
    trained, expected = module.state_dict(), net.state_dict()
    assert_close(trained, expected, rtol=0, atol=1e-6)
    # Otherwise the method did nothing.
    fit(constant := NoisyNet(), batches, max_epochs=EPOCHS, accumulate_grad_batches=accumulated, callbacks=[Seeds()])
    assert (trained["backbone.0.0.weight"] - constant.backbone[0][0].weight).abs().max() > 1e-3
    for parameter in module.mtl_method.parameters():
        assert (parameter != 0).all()


@pytest.mark.parametrize(("method", "names"), [(UW, "mtl_method.log_var"), (IMTLL, "mtl_method.log_scale")])
def test_parameters_that_no_optimizer_has_are_named(method: Any, names: str) -> None:
    module = Net(method(3))
    module.make_optimizer = lambda parameters: torch.optim.SGD(module.backbone.parameters(), lr=0.1)
    with pytest.raises(
        MisconfigurationException, match=f"learns {names}, but no optimizer has it. Pass `self.parameters"
    ):
        fit(module, make_batches(1))


@pytest.mark.parametrize("weighting", [MoDoWeighting(), SDMGradWeighting(), CRMOGMWeighting(MoDoWeighting())])
def test_methods_that_need_two_batches_a_step_are_refused(weighting: Any) -> None:
    with pytest.raises(MisconfigurationException, match="two independent batches"):
        fit(Net(GramianWeightedAggregator(weighting)), make_batches(1))


def test_famo_refuses_losses_below_their_bounds() -> None:
    with pytest.raises(
        ValueError, match=r"FAMO failed at step 0: .*its `min_losses`, which are \[5.0, 0.0, 0.0\] in the order"
    ):
        fit(Net(FAMO(3, min_losses=torch.tensor([5.0, 0, 0]))), make_batches(1))


def test_famo_without_the_hook_of_the_mixin_is_an_error() -> None:
    class Forgetful(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

    with pytest.raises(MisconfigurationException, match="so FAMO cannot learn its weights"):
        fit(Forgetful(FAMO(3)), make_batches(1))
