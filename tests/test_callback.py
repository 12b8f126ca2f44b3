"""What a user sees of the callback: arguments, schedule, reports, logs, and training that goes on."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from peft import LoHaConfig, LoraConfig
from torch import Tensor, nn
from torchjd.aggregation import UPGrad
from torchjd.scalarization import UW

from lightning_cost import (
    ConflictAlignment,
    GradientNorm,
    LevelSetSearch,
    PenaltySearch,
    RandomDirection,
    Reversed,
    SampledSharpness,
    SymmetryTeleportCallback,
)
from lightning_cost._lightning.progress import StageDisplay
from lightning_cost._training.shared import shared_parameters
from tests.support.nets import TASKS, Batch, Net, PlainNet, fit, make_batches, make_mlp, make_trainer
from tests.support.teleporting import NoisyNet, Spy, always, assert_same, final_state, never, snapshot, teleporter


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


class OddLayers(Net):
    """With layers that PEFT cannot change or would change wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "plain": make_mlp(5, 4),
                "normed": nn.utils.parametrizations.weight_norm(make_mlp(4, 4)[0]),
                "grouped": nn.Conv1d(4, 4, 1, groups=2),
                "recurrent": nn.GRU(4, 4, batch_first=True),
                "attention": nn.MultiheadAttention(4, 1, batch_first=True),
                "padded": nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
            }
        )

    def features(self, batch: Batch) -> Tensor:
        layers = self.backbone
        x = layers["normed"](layers["plain"](batch["x"]).tanh())[:, :, None]
        x = layers["padded"](layers["grouped"](x).expand(-1, -1, 3)).transpose(1, 2)
        x = layers["recurrent"](x)[0]
        return layers["attention"](x, x, x, need_weights=False)[0].mean(dim=1)


def test_layers_out_of_reach_are_listed_once() -> None:
    module, callback = OddLayers(), teleporter(search=PenaltySearch(steps=2, lr=1e-3))
    with pytest.warns(UserWarning, match="Teleports take steps") as caught:
        fit(module, make_batches(3), callbacks=[callback])
    (message,) = (str(warning.message) for warning in caught if "Teleports take steps" in str(warning.message))
    for left_out in (
        "backbone.normed.parametrizations.weight (ParametrizationList)",
        "backbone.grouped (Conv1d)",
        "backbone.recurrent (GRU)",
        "backbone.attention (MultiheadAttention)",
    ):
        assert left_out in message
    assert "plain" not in message
    assert "padded" not in message
    # 20 + 16 + 48 elements of the weights of the plain, projecting and padded layers.
    total = sum(parameter.numel() for parameter in shared_parameters(module))
    assert f"{84 / total:.0%} of the shared parameters" in message


@pytest.mark.filterwarnings("error:Teleports take steps")
def test_the_level_set_search_reaches_them_all() -> None:
    callback = teleporter()
    fit(OddLayers(), make_batches(4), callbacks=[callback])
    assert any(report.accepted for report in callback.reports)


def test_a_small_share_of_the_parameters_warns() -> None:
    callback = teleporter(search=LevelSetSearch(target_modules=["backbone.2"]))
    with pytest.warns(UserWarning, match="in 38% of the shared parameters"):
        fit(Net(), make_batches(2), callbacks=[callback])


def test_a_schedule_that_never_begins_warns() -> None:
    with pytest.warns(UserWarning, match="`start_epoch=3` is never reached"):
        fit(Net(), make_batches(2), callbacks=[teleporter(start_epoch=3)], max_epochs=3)


def test_several_optimizers_are_refused() -> None:
    # Lightning itself refuses them under automatic optimization, in its own words.
    with pytest.raises((MisconfigurationException, RuntimeError), match="optimizer"):
        fit(TwoOptimizers(), make_batches(2), callbacks=[teleporter()])


def test_frozen_backbone_is_refused() -> None:
    module = Net()
    module.backbone.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="shared_module"):
        fit(module, make_batches(2), callbacks=[teleporter()])


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


SEARCHES = [
    {},
    {"search": LevelSetSearch(steps=3, full_rank=True)},
    {"objective": ConflictAlignment(derivative="double_backward")},
    {"objective": "gradient_norm"},
    {"objective": "sharpness"},
    {"objective": SampledSharpness(form="difference")},
    {"objective": RandomDirection()},
    {"objective": Reversed(ConflictAlignment())},
    {"invariance": "mean"},
    {"search": PenaltySearch(steps=4, lr=1e-2)},
    {"search": PenaltySearch(LoHaConfig(r=2), steps=4, lr=1e-2), "objective": GradientNorm()},
    {"search": PenaltySearch(steps=4, lr=1e-2, gamma=10.0), "objective": "sharpness"},
]


@pytest.mark.parametrize("settings", SEARCHES, ids=repr)
@pytest.mark.parametrize("make", [Net, NoisyNet])
def test_teleport_holds_the_losses_or_changes_nothing(settings: dict[str, Any], make: Any) -> None:
    """Rule 4, measured from outside."""
    before, after = Spy(), Spy()
    callback = teleporter(**settings)
    module = make(UPGrad())
    batches = make_batches(8)
    fit(module, batches, callbacks=[before, callback, after])
    assert len(callback.reports) == 8
    assert any(report.accepted for report in callback.reports)
    for step, report in enumerate(callback.reports):
        one, two = before.snapshots[step], after.snapshots[step]
        if not report.accepted:
            assert_same(two, one)
            assert report.losses_after == report.losses_before
            continue
        for kept in ("identities", "requires_grad", "buffers", "modes", "modules", "attributes", "keys", "random"):
            assert_same(two[kept], one[kept])
        moved = [name for name, value in two["parameters"].items() if not torch.equal(value, one["parameters"][name])]
        assert moved
        assert all(name.startswith("backbone.") for name in moved)
        if make is Net:
            losses = [_losses(module, snap["parameters"], batches[step]) for snap in (one, two)]
            if settings.get("invariance") == "mean":
                losses = [value.mean(dim=0, keepdim=True) for value in losses]
            drift = float(((losses[1] - losses[0]) / losses[0]).abs().max())
            assert drift <= 0.02 + 1e-5
            assert drift == pytest.approx(report.drift, abs=1e-5)


def _losses(module: Net, parameters: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    current = {name: value.detach().clone() for name, value in module.named_parameters()}
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(parameters[name])
        losses = torch.stack(list(module.losses(batch).values()))
        for name, value in module.named_parameters():
            value.copy_(current[name])
    return losses


def test_reports_are_those_of_an_independent_measurement() -> None:
    module, before, after = Net(), Spy(), Spy()
    callback = teleporter()
    batches = make_batches(6)
    fit(module, batches, callbacks=[before, callback, after])
    for step, report in enumerate(callback.reports):
        for spy, losses, cosines, norm in (
            (before, report.losses_before, report.cosines_before, report.grad_norm_before),
            (after, report.losses_after, report.cosines_after, report.grad_norm_after),
        ):
            with torch.no_grad():
                for name, value in module.named_parameters():
                    value.copy_(spy.snapshots[step]["parameters"][name])
            rows = []
            for task, loss in module.losses(batches[step]).items():
                assert losses[task] == pytest.approx(loss.item(), rel=1e-5)
                gradients = torch.autograd.grad(loss, list(module.backbone.parameters()), retain_graph=True)
                rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            matrix = torch.stack(rows).double()
            mean = matrix.mean(dim=0)
            assert norm == pytest.approx(mean.norm().item(), rel=1e-4)
            expected = torch.nn.functional.cosine_similarity(matrix, mean[None], dim=1)
            assert list(cosines.values()) == pytest.approx(expected.tolist(), abs=1e-4)
        if report.accepted:
            assert min(report.cosines_after.values()) > min(report.cosines_before.values())


@pytest.mark.parametrize("method", [None, UPGrad, lambda: UW(3)], ids=["LS", "UPGrad", "UW"])
@pytest.mark.parametrize("settings", [{}, {"search": "penalty"}, {"check_every_n_steps": 2}], ids=repr)
def test_a_trigger_that_never_fires_changes_no_bit(method: Any, settings: dict[str, Any]) -> None:
    """Rule 5."""
    states = []
    for callbacks in ([], [SymmetryTeleportCallback(trigger=never, start_epoch=0, history="paper", **settings)]):
        torch.manual_seed(3)
        module = NoisyNet(method() if method else None)
        module.make_optimizer = partial(torch.optim.Adam, lr=1e-2)
        trainer = fit(module, make_batches(6), callbacks=callbacks, max_epochs=2, gradient_clip_val=0.5)
        states.append({**final_state(module, trainer), "random": torch.get_rng_state()})
    assert_same(states[1], states[0])


@pytest.mark.parametrize("method", [None, UPGrad, lambda: UW(3)], ids=["LS", "UPGrad", "UW"])
def test_the_step_after_a_teleport_uses_the_gradients_of_the_new_point(method: Any) -> None:
    class Check(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            losses = pl_module.losses(batches[trainer.global_step])
            shared, heads = list(pl_module.backbone.parameters()), list(pl_module.heads.parameters())
            rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses.values()]
            matrix = torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])
            torch.testing.assert_close(pl_module.task_gradients.matrix, matrix, rtol=1e-4, atol=1e-5)
            values = torch.stack(list(losses.values()))
            if isinstance(pl_module.mtl_method, UPGrad):
                total = values.sum()
            else:
                total = values.mean() if pl_module.mtl_method is None else pl_module.mtl_method(values)
            expected = torch.autograd.grad(total, heads)
            torch.testing.assert_close([p.grad for p in heads], list(expected), rtol=1e-4, atol=1e-5)

    batches = make_batches(5)
    callback = teleporter()
    fit(Net(method() if method else None), batches, callbacks=[callback, Check()])
    assert any(report.accepted for report in callback.reports)


def test_accumulated_batches_teleport_like_one_large_batch() -> None:
    large = make_batches(6, size=32)
    small = [{key: value[i : i + 8] for key, value in batch.items()} for batch in large for i in range(0, 32, 8)]
    states, callbacks = [], [teleporter(), teleporter()]
    for callback, batches, factor in zip(callbacks, (large, small), (1, 4), strict=True):
        module = Net(UPGrad())
        fit(module, batches, callbacks=[callback], accumulate_grad_batches=factor)
        states.append(dict(module.state_dict()))
    assert sum(report.accepted for report in callbacks[0].reports) >= 3
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bar_shows_a_running_teleport(bar: Any, capsys: Any) -> None:
    descriptions: list[str | None] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            display = StageDisplay(trainer, patience=0.0)
            original = display._describe("Epoch")
            display._describe(str(original))
            with display:
                display("candidate")
                descriptions.append(display._describe("teleporting: candidate"))
            descriptions.append(display._describe(str(original)))
            descriptions.append(original)

    trainer = make_trainer(enable_progress_bar=True, callbacks=[bar(), Watch()])
    trainer.fit(Net(), torch.utils.data.DataLoader(make_batches(1), batch_size=None))
    shown, restored, original = descriptions
    assert shown == "teleporting: candidate"
    assert restored == original


def test_silent_without_a_progress_bar() -> None:
    with StageDisplay(make_trainer(), patience=0.0) as display:
        display("candidate")


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "amsgrad": partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=1e-2),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "radam": partial(torch.optim.RAdam, lr=3e-2),
    "adamax": partial(torch.optim.Adamax, lr=1e-2),
    "momentum": partial(torch.optim.SGD, lr=2e-2, momentum=0.9),
    "sgd": partial(torch.optim.SGD, lr=0.1),
}


@pytest.mark.parametrize("history", ["paper", "momentum", "keep", "reset"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_and_history_trains_on(optimizer: str, history: Any) -> None:
    module, batches = Net(UPGrad()), make_batches(4, size=4)
    module.make_optimizer = OPTIMIZERS[optimizer]
    callback = teleporter(history=history, check_every_n_steps=2)
    with torch.no_grad():
        before = torch.stack([torch.stack(list(module.losses(batch).values())) for batch in batches]).sum()
    fit(module, batches, callbacks=[callback], max_epochs=15)
    with torch.no_grad():
        after = torch.stack([torch.stack(list(module.losses(batch).values())) for batch in batches]).sum()
    assert any(report.accepted for report in callback.reports)
    assert after < 0.9 * before


class SingleLinear(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 4)


class SharedTwice(Net):
    """The same layer is used twice, and registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(5, 5)
        self.backbone = nn.Sequential(layer, nn.Tanh(), layer, make_mlp(5, 4))


class TiedWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        one, two = nn.Linear(5, 5), nn.Linear(5, 5)
        two.weight = one.weight
        self.backbone = nn.Sequential(one, nn.Tanh(), two, make_mlp(5, 4))


class PartlyFrozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone[0].requires_grad_(False)


class TwoModules(Net):
    shared_module = ("backbone", "neck.inner")

    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.ModuleDict({"inner": nn.Linear(4, 4), "outer": nn.Identity()})

    def features(self, batch: Any) -> torch.Tensor:
        return self.neck["inner"](self.backbone(batch["x"]).tanh()).tanh()


class TupleBatches(Net):
    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        return self.losses({"x": batch[0], **dict(zip(TASKS, batch[1], strict=True))})


class ParameterGroups(Net):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.heads.parameters(), "lr": 0.1}, {"params": self.backbone.parameters(), "lr": 0.01}]
        optimizer = torch.optim.AdamW(groups)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.GRU(5, 4, batch_first=True)

    def features(self, batch: Any) -> torch.Tensor:
        return self.backbone(batch["x"][:, None])[0][:, 0]


@pytest.mark.parametrize(
    "make", [SingleLinear, SharedTwice, TiedWeights, PartlyFrozen, TwoModules, TupleBatches, ParameterGroups, Recurrent]
)
@pytest.mark.parametrize("settings", [{}, {"search": PenaltySearch(steps=3, lr=1e-2)}], ids=["level_set", "penalty"])
def test_unusual_modules(make: Any, settings: dict[str, Any]) -> None:
    if make is Recurrent and settings:
        pytest.skip("PEFT reaches no recurrent layer, which another test covers")
    torch.manual_seed(0)
    module = make()
    batches: list[Any] = make_batches(6)
    if make is TupleBatches:
        batches = [(batch["x"], tuple(batch[task] for task in TASKS)) for batch in batches]
    before = snapshot(module)
    callback = teleporter(history="paper" if make is ParameterGroups else "keep", **settings)
    fit(module, batches, callbacks=[callback])
    after = snapshot(module)
    assert any(report.accepted for report in callback.reports)
    for kept in ("identities", "requires_grad", "modules", "keys"):
        assert_same(after[kept], before[kept])
    frozen = [name for name, trainable in before["requires_grad"].items() if not trainable]
    assert_same([after["parameters"][n] for n in frozen], [before["parameters"][n] for n in frozen])
