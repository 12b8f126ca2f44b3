"""Evaluating the task losses of a module."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_cost._lightning.recording import RecordedBatch, Scene
from lightning_cost._training.evaluator import Evaluator
from tests.support.nets import Net, fit, make_batches
from tests.support.problems import mlp_batch, mlp_problem, trainer


class Changing(Net):
    """Returns what it is told to."""

    returned: Any = staticmethod(lambda losses: losses)

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        return self.returned(super().task_losses(batch, batch_idx))


def test_tasks_keep_the_order_in_which_they_appeared() -> None:
    module, (batch,) = Changing(), make_batches(1)
    evaluator = Evaluator(module)
    assert evaluator.names == ()
    module.returned = lambda losses: {"ink": None, "left": losses["left"]}
    assert list(evaluator.evaluate(batch, 0)) == ["left"]
    module.returned = lambda losses: dict(reversed(losses.items()))
    with pytest.warns(UserWarning, match="returned 'right' for the first time"):
        assert list(evaluator.evaluate(batch, 0)) == ["ink", "left", "right"]
    assert evaluator.names == ("ink", "left", "right")


def test_a_further_evaluation_knows_no_new_tasks() -> None:
    module, (batch,) = Changing(), make_batches(1)
    module.trainer = trainer()
    evaluator = Evaluator(module)
    scene = Scene(module, batch, 0)
    record = RecordedBatch(scene, evaluator.evaluate(batch, 0))
    module.returned = lambda losses: losses | {"new": losses["left"]}
    with warnings.catch_warnings(), evaluator.without_trace():
        warnings.simplefilter("error")
        assert set(evaluator.replay(record)) == {"left", "right", "ink"}
    assert evaluator.names == ("left", "right", "ink")


def test_losses_are_evaluated_again_from_what_was_there_before() -> None:
    module, batch = mlp_problem(num_tasks=2), mlp_batch(num_tasks=2)
    module.trainer = trainer()
    module.register_buffer("shift", torch.zeros(()))
    original = module.task_losses

    def shifted(batch: Any, batch_idx: int) -> dict[str, Tensor]:
        module.shift += 1
        return {name: loss * module.shift for name, loss in original(batch, batch_idx).items()}

    module.task_losses = shifted
    evaluator, scene = Evaluator(module), Scene(module, batch, 0)
    losses = evaluator.evaluate(batch, 0)
    record = RecordedBatch(scene, {name: loss.detach() for name, loss in losses.items()})
    assert float(module.shift) == 1
    again = evaluator.evaluate_again([record, record])
    torch.testing.assert_close(again, torch.stack([loss.detach() for loss in losses.values()]))
    assert float(module.shift) == 1
    assert not module.replaying


def test_names_of_a_checkpoint_count_where_training_is_resumed(tmp_path: Any) -> None:
    module = Net()
    fit(module, make_batches(1)).save_checkpoint(tmp_path / "saved.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert Evaluator(loaded).names == ()

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.names = Evaluator(pl_module).names

    look = Look()
    fit(Net(), make_batches(1), ckpt_path=tmp_path / "saved.ckpt", callbacks=[look], max_epochs=2)
    assert look.names == ("left", "right", "ink")
