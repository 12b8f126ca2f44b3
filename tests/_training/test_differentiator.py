"""What collects the rows of a step."""

from __future__ import annotations

from typing import Any

import pytest
from torchjd.aggregation import UPGrad
from torchjd.scalarization import UW

from lightning_cost._training.differentiator import Differentiator
from lightning_cost._training.engine import Engine
from tests.support.nets import TASKS, Net, fit, make_batches


class Asking(Net):
    """Asks for a pair of rows, and keeps what was collected."""

    def __init__(self, mtl_method: Any = None, tasks: Any = TASKS, lazily: bool = True) -> None:
        super().__init__(mtl_method, tasks)
        self.lazily = lazily
        self.collected: list[str] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        Engine(self).request(batches=True, lazily=self.lazily)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        step = Engine(self).step
        assert step is not None
        self.collected.append("all" if step.pair is None else step.pair.task)
        super().on_before_optimizer_step(optimizer)


def test_the_engine_is_one() -> None:
    assert issubclass(Engine, Differentiator)


@pytest.mark.parametrize(
    ("module", "lazy"),
    [
        (Asking(), True),
        (Asking(UW(3)), True),
        (Asking(lazily=False), False),
        # An aggregator needs all rows anyway, and the second of two rows costs nothing.
        (Asking(UPGrad()), False),
        (Asking(tasks=TASKS[:2]), False),
    ],
    ids=["mean", "UW", "exact", "UPGrad", "two tasks"],
)
def test_a_pair_is_collected_where_it_saves_backward_passes(module: Asking, lazy: bool) -> None:
    fit(module, make_batches(5))
    assert module.collected[0] == "all"
    assert all((collected in TASKS) == lazy for collected in module.collected[1:])


def test_no_request_collects_nothing() -> None:
    module = Net()
    fit(module, make_batches(3))
    assert module.task_gradients is None


def test_all_rows_of_a_step_with_a_pair_free_its_graph() -> None:
    class Expanding(Asking):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            step = Engine(self).step
            assert step is not None
            if step.pair is not None:
                assert step.graphs is not None
                assert self.task_gradients is None
                Engine(self).expand()
                assert step.graphs is None
                assert self.task_gradients.names == TASKS
            super().on_before_optimizer_step(optimizer)

    fit(Expanding(), make_batches(4))
