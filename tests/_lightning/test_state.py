"""Putting back what modules hold apart from their parameters."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_cost._lightning.state import BufferState, ModuleState, unchanged_buffers


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.zeros(2))
        self.register_buffer("missing", None)
        self.tensor = torch.zeros(2)
        self.array = np.zeros(2)
        self.items = [1, 2]
        self.last = deque([1], maxlen=2)
        self.table = {"a": 1}
        self.names = {"a"}
        self.count = 0
        self.torch_generator = torch.Generator().manual_seed(0)
        self.python_generator = random.Random(0)
        self.numpy_generator = np.random.default_rng(0)
        self.old_generator = np.random.RandomState(0)

    def draws(self) -> list[float]:
        return [
            float(torch.rand((), generator=self.torch_generator)),
            self.python_generator.random(),
            float(self.numpy_generator.random()),
            float(self.old_generator.rand()),
        ]

    def everything(self) -> list[Any]:
        tensors = [self.buffer.tolist(), self.missing, self.tensor.tolist(), self.array.tolist()]
        return [*tensors, list(self.items), list(self.last), dict(self.table), set(self.names), self.count]


def test_buffers_are_restored_in_place() -> None:
    norm = nn.BatchNorm1d(2)
    mean, state = norm.running_mean, BufferState([norm])
    norm(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    norm.running_var = torch.zeros(2)
    norm.register_buffer("new", torch.ones(1))
    state.restore()
    assert norm.running_mean is mean
    assert mean.tolist() == [0.0, 0.0]
    assert norm.running_var.tolist() == [1.0, 1.0]
    assert "new" not in norm._buffers


def test_buffers_come_back_under_a_graph_that_has_saved_them() -> None:
    module, weight = Holder(), torch.ones(2, requires_grad=True)
    loss = (weight * module.buffer.add_(3)).sum()
    with unchanged_buffers(module):
        module.buffer.data.fill_(7)
    assert module.buffer.tolist() == [3, 3]
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3, 3]


def test_whatever_a_module_holds_comes_back() -> None:
    module = Holder()
    objects = [module.buffer, module.tensor, module.array, module.items, module.last, module.table, module.names]
    before, state = module.everything(), ModuleState([module])
    first = module.draws()
    module.buffer.add_(1)
    module.missing = torch.ones(1)
    module.tensor.add_(1)
    module.array += 1
    module.items.append(3)
    module.last.extend([2, 3])
    module.table["a"] = 2
    module.names.add("b")
    module.count += 1
    module.new = 1
    state.restore()
    assert module.everything() == before
    assert module.draws() == first
    assert not hasattr(module, "new")
    now = [module.buffer, module.tensor, module.array, module.items, module.last, module.table, module.names]
    assert all(one is two for one, two in zip(objects, now, strict=True))


def test_objects_that_were_replaced_come_back() -> None:
    module = Holder()
    tensor, items, state = module.tensor, module.items, ModuleState([module])
    module.tensor, module.items = torch.ones(3), []
    del module.count
    state.restore()
    assert module.tensor is tensor
    assert module.items is items
    assert module.count == 0


def test_a_method_that_somebody_replaced_stays() -> None:
    module = Holder()
    state = ModuleState([module])
    module.draws = lambda: [1.0]  # type: ignore[method-assign]
    state.restore()
    assert module.draws() == [1.0]


def test_a_tensor_with_a_graph_is_not_written_into() -> None:
    module = Holder()
    module.loss = (torch.ones(2, requires_grad=True) * 2).sum()
    loss, version = module.loss, module.loss._version
    ModuleState([module]).restore()
    assert module.loss is loss
    assert loss._version == version


def test_tensors_of_all_layouts_and_shared_ones_come_back() -> None:
    module = nn.Module()
    module.plain = module.same = torch.ones(3)
    module.transposed, module.sparse = torch.ones(2, 3).T, torch.eye(2).to_sparse()
    module.inside = torch.ones(4)[1:3]
    state = ModuleState([module])
    with torch.no_grad():
        for tensor in (module.plain, module.transposed, module.sparse, module.inside):
            tensor.mul_(5)
    # Writing through `.data`, and onto other memory, is seen as well.
    module.plain.data = torch.zeros(3)
    state.restore()
    assert module.same is module.plain
    for tensor, expected in (
        (module.plain, torch.ones(3)),
        (module.transposed, torch.ones(3, 2)),
        (module.inside, torch.ones(2)),
    ):
        assert torch.equal(tensor, expected)
    assert torch.equal(module.sparse.to_dense(), torch.eye(2))


def test_containers_that_change_in_place_come_back() -> None:
    module = nn.Module()
    module.items_, module.table = [1, 2], {"a": 1, "b": 2}
    state = ModuleState([module])
    first, second = module.items_, module.table
    module.items_[0], module.table["b"] = 5, 7
    state.restore()
    assert (first, second) == ([1, 2], {"a": 1, "b": 2})
    # The same values under other keys.
    value = module.table.pop("a")
    module.table = second
    second.clear()
    second.update({"c": value, "b": 2})
    state.restore()
    assert second == {"a": 1, "b": 2}
    assert list(second) == ["a", "b"]


def test_attributes_that_appear_vanish_or_change_places_come_back() -> None:
    module, other = nn.Module(), nn.Module()
    module.a, module.b, other.c = "one", "two", "three"
    state = ModuleState([module, other])
    # As many attributes as before, and the same objects in another order.
    module.a, module.b = module.b, module.a
    del other.c
    other.d = "three"
    state.restore()
    assert (module.a, module.b, other.c) == ("one", "two", "three")
