"""What a user sees of the callback: arguments, what is refused, schedule and logs."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig
from torch import nn
from torchjd.aggregation import UPGrad

from lightning_cost import LevelSetSearch, PenaltySearch, SampledSharpness, SymmetryTeleportCallback
from lightning_cost._training.engine import Engine
from tests.support.nets import TASKS, Batch, Net, PlainNet, fit, make_batches, make_mlp
from tests.support.teleporting import always, assert_same, teleporter


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("trigger", "sometimes"),
        ("objective", "loss"),
        ("search", "random"),
        ("start_epoch", -1),
        ("max_per_epoch", 0),
        ("check_every_n_steps", 0),
        ("check_every_n_steps", 1.5),
        ("tolerance", 0.0),
        ("tolerance", float("inf")),
        ("invariance", "sum"),
        ("history", "forget"),
        ("seed", "zero"),
    ],
)
def test_bad_arguments_are_refused_by_name(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        SymmetryTeleportCallback(**{argument: value})


def test_paper_settings() -> None:
    callback = SymmetryTeleportCallback.paper(start_epoch=7)
    assert callback.schedule.start_epoch == 7
    assert callback.schedule.max_per_epoch == 1
    assert callback._history.mode == "paper"
    assert callback._teleporter.tolerance is None
    assert callback._teleporter.search.adapter.r == 5
    search, objective = callback._teleporter.search, callback._teleporter.objective
    assert isinstance(search, PenaltySearch)
    assert (search.gamma, search.relative) == (0.1, False)
    assert isinstance(objective, SampledSharpness)
    assert objective.form == "loss"


class ManualNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(ManualNet):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.backbone.parameters(), 0.1), torch.optim.SGD(self.heads.parameters(), 0.1)]


class VectorBackbone(Net):
    """Its only shared parameter is a vector, which no adapter reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.LayerNorm(5)
        self.heads = nn.ModuleDict({task: make_mlp(5, 1) for task in TASKS})


def _with_optimizer(optimizer: Any) -> Net:
    net = Net()
    net.make_optimizer = optimizer
    return net


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (PlainNet, {}, "subclasses MultiTaskMixin"),
        (ManualNet, {}, "automatic optimization"),
        (VectorBackbone, {}, "reaches no weight"),
        (VectorBackbone, {"search": "penalty"}, "reaches no weight"),
        (Net, {"search": LevelSetSearch(target_modules=["nowhere"])}, "nowhere"),
        (Net, {"search": PenaltySearch(LoraConfig(r=2, target_modules=["nowhere"]))}, "nowhere"),
        (lambda: _with_optimizer(partial(torch.optim.Adagrad, lr=0.1)), {"history": "paper"}, "Adagrad"),
        (lambda: _with_optimizer(partial(torch.optim.LBFGS, lr=0.1)), {}, "LBFGS"),
        (lambda: Net(tasks=("left",)), {}, "at least 2 tasks"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(make: Any, settings: dict[str, Any], message: str) -> None:
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, make_batches(2), callbacks=[teleporter(**settings)])
    assert_same(dict(module.state_dict()), before)


def test_a_schedule_that_never_begins_warns() -> None:
    with pytest.warns(UserWarning, match="`start_epoch=3` is never reached"):
        fit(Net(), make_batches(2), callbacks=[teleporter(start_epoch=3)], max_epochs=3)


def test_several_optimizers_are_refused() -> None:
    # Lightning itself refuses them under automatic optimization, in its own words.
    with pytest.raises((MisconfigurationException, RuntimeError), match="optimizer"):
        fit(TwoOptimizers(), make_batches(2), callbacks=[teleporter()])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"start_epoch": 1}, [(1, 4), (1, 5), (1, 6), (1, 7), (2, 8), (2, 9), (2, 10), (2, 11)]),
        ({"start_epoch": 0, "max_per_epoch": 1}, [(0, 0), (1, 4), (2, 8)]),
        ({"start_epoch": 1, "check_every_n_steps": 3}, [(1, 6), (2, 9)]),
    ],
)
def test_schedule(settings: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    callback = SymmetryTeleportCallback(trigger=always, **settings)
    fit(Net(), make_batches(4), callbacks=[callback], max_epochs=3)
    assert [(report.epoch, report.step) for report in callback.reports] == expected


def test_should_check_can_be_overridden() -> None:
    class OnlyStepTwo(SymmetryTeleportCallback):
        def should_check(self, trainer: L.Trainer, pl_module: Any) -> bool:
            return trainer.global_step == 2

    callback = OnlyStepTwo(trigger=always)
    fit(Net(), make_batches(5), callbacks=[callback])
    assert [report.step for report in callback.reports] == [2]


@pytest.mark.parametrize("trigger", ["dominated", "majority", "any", "weak"])
def test_named_triggers_fire_exactly_on_their_condition(trigger: str) -> None:
    from lightning_cost.triggers import TRIGGERS

    fired = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            if TRIGGERS[trigger](pl_module.task_gradients):
                fired.append(trainer.global_step)

    callback = SymmetryTeleportCallback(trigger=trigger, start_epoch=0)
    fit(Net(), make_batches(20), callbacks=[Watch(), callback])
    assert [report.step for report in callback.reports] == fired


def test_logs(tmp_path: Any) -> None:
    callback = teleporter(check_every_n_steps=2)
    trainer = fit(
        Net(), make_batches(8), callbacks=[callback], logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=2
    )
    second = [report for report in callback.reports if report.epoch == 1]
    metrics = trainer.callback_metrics
    assert metrics["cost/conflict_share"] == 1.0
    assert metrics["cost/accepted"] == sum(report.accepted for report in second)
    assert metrics["cost/rejected"] == sum(not report.accepted for report in second)
    accepted = [report for report in second if report.accepted]
    assert len(accepted) >= 2
    for name, values in {
        "cost/drift": [report.drift for report in accepted],
        "cost/cosine_before": [min(report.cosines_before.values()) for report in accepted],
        "cost/cosine_after": [min(report.cosines_after.values()) for report in accepted],
    }.items():
        assert metrics[name] == pytest.approx(sum(values) / len(values))


def test_batches_are_kept_only_where_a_check_is_due() -> None:
    class Counts(L.Callback):
        def __init__(self) -> None:
            self.kept: list[int] = []

        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.kept.append(len(Engine(pl_module).step.batches))

    counts = Counts()
    callbacks = [counts, teleporter(check_every_n_steps=2)]
    fit(Net(UPGrad()), make_batches(12), callbacks=callbacks, accumulate_grad_batches=3)
    assert counts.kept == [1, 2, 3, 0, 0, 0, 1, 2, 3, 0, 0, 0]


class Skipping(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) if batch_idx != 3 else None
        return None if batch_idx in (0, 2) else loss


def test_batches_that_training_skips_are_not_teleported_on() -> None:
    callback = teleporter()
    fit(Skipping(), make_batches(6), callbacks=[callback])
    assert [report.step for report in callback.reports] == [1, 4, 5]


class EarlyEnd(Net):
    """Ends its first epoch before the first batch."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        return -1 if self.trainer.current_epoch == 0 else None


def test_whether_a_check_is_due_is_asked_anew_in_each_epoch() -> None:
    callback = teleporter(start_epoch=1)
    fit(EarlyEnd(), make_batches(3), callbacks=[callback], max_epochs=2)
    assert [report.step for report in callback.reports] == [0, 1, 2]

    class FirstEpoch(SymmetryTeleportCallback):
        def should_check(self, trainer: L.Trainer, pl_module: Any) -> bool:
            return trainer.current_epoch == 0

    first = FirstEpoch(trigger=always)
    fit(EarlyEnd(), make_batches(3), callbacks=[first], max_epochs=2)
    assert first.reports == []


def test_a_second_callback_is_refused() -> None:
    class Other(SymmetryTeleportCallback):
        pass

    with pytest.raises(MisconfigurationException, match=r"one SymmetryTeleportCallback; got 2: .* and Other. Remove"):
        fit(Net(), make_batches(3), callbacks=[teleporter(), Other()])


def test_a_fit_that_fails_leaves_no_hook_and_no_memory() -> None:
    class Failing(Net):
        def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
            raise RuntimeError("fault")

    module, callback = Failing(), teleporter(history="momentum")
    optimizers: list[Any] = []
    module.make_optimizer = lambda parameters: optimizers.append(torch.optim.SGD(parameters, 0.1)) or optimizers[-1]
    with pytest.raises(RuntimeError, match="fault"):
        fit(module, make_batches(2), callbacks=[callback])
    assert not optimizers[0]._optimizer_step_pre_hooks
    assert callback._fit is None


def test_a_callback_without_super_in_on_fit_start_is_told_so() -> None:
    class Hasty(SymmetryTeleportCallback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pass

    with pytest.raises(MisconfigurationException, match=r"Hasty.on_fit_start did not call `super\(\).on_fit_start"):
        fit(Net(), make_batches(2), callbacks=[Hasty()])
