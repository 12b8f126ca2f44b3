"""Collectives with one process do nothing. ``trainers/test_ddp.py`` tests them with two."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from lightning_cost._lightning.ranks import Ranks
from tests.support.nets import Net, make_trainer


@pytest.fixture(autouse=True)
def no_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process group every collective of torch would raise an error; this one says which."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("communicated")

    for name in ("all_reduce", "broadcast", "all_gather_object"):
        monkeypatch.setattr(torch.distributed, name, forbidden)


def test_tensors_stay_as_they_are() -> None:
    tensor = torch.tensor([1.0, 2.5])
    for found in (Ranks().mean_(tensor), Ranks().mean_(tensor, torch.bfloat16), Ranks().broadcast_(tensor)):
        assert found is tensor
    assert tensor.tolist() == [1.0, 2.5]


def test_decisions_are_those_of_the_only_process() -> None:
    ranks = Ranks()
    assert ranks.any_of([True, False]) == [True, False]
    assert ranks.any_of([]) == []
    assert ranks.gather({"left": 1}) == [{"left": 1}]
    for decision in (True, False):
        assert ranks.decide(decision) is decision
        assert ranks.agree(decision) is decision
    ranks.check_equal([torch.ones(2), torch.tensor(torch.nan)])


def test_gradients_stay_as_they_are() -> None:
    with_gradient, without = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    with_gradient.grad = torch.tensor([3.0, 4.0])
    Ranks().mean_gradients_([with_gradient, without])
    assert with_gradient.grad.tolist() == [3.0, 4.0]
    assert without.grad is None


def test_a_block_that_fails_raises_its_own_error() -> None:
    with Ranks().fail_together():
        pass
    with pytest.raises(ArithmeticError, match="fault"), Ranks().fail_together():
        raise ArithmeticError("fault")


def test_processes_are_those_of_the_trainer() -> None:
    module = Net()
    module.trainer = make_trainer()
    ranks = Ranks.of(module)
    assert ranks.size == 1
    assert ranks.device == module.device
    assert Ranks().device == torch.device("cpu")
