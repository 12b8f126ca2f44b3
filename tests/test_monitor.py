"""The monitor measures what NumPy measures, and a run with it is the run without it."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import rich
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torchjd.aggregation import CAGrad, PCGrad, UPGrad
from torchjd.scalarization import FAMO, Random

from lightning_cost import ConflictMonitor, ScaleInvariant, SymmetryTeleportCallback
from lightning_cost.plots import conflict_heat_map
from tests.support.ddp_runs import scaler_plugins, watched
from tests.support.nets import TASKS, Batch, Net, PlainNet, assert_same_parameters, fit, make_batches, make_mlp
from tests.support.ranks import RankPool
from tests.support.teleporting import teleporter

SCALES = (1.0, 5.0, 0.1)
quiet = partial(ConflictMonitor, table=False)


class Noisy(Net):
    """Draws random numbers in its forward pass, and its second task often has no labels."""

    def __init__(self, mtl_method: Any = None) -> None:
        super().__init__(mtl_method, scales=SCALES)
        self.backbone = nn.Sequential(make_mlp(5, 6), nn.Dropout(0.3), nn.BatchNorm1d(6), nn.Tanh(), make_mlp(6, 4))

    def task_losses(self, batch: Batch, batch_idx: int) -> Any:
        losses = self.losses(batch)
        return losses if batch_idx % 3 else {**losses, "right": None}


def recorded(callback: ConflictMonitor, batches: int = 12, **settings: Any) -> Net:
    torch.manual_seed(0)
    module = Net(scales=SCALES)
    fit(module, make_batches(batches), callbacks=[callback], **settings)
    return module


def rows_by_hand(num_steps: int) -> list[np.ndarray]:
    """The task gradients of every step of a run on the mean of the losses, without the library."""
    module, rows = PlainNet(scales=SCALES), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for batch in make_batches(num_steps):
        losses, shared = module.losses(batch), list(module.backbone.parameters())
        per_task = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses.values()]
        rows.append(np.array([torch.cat([g.flatten() for g in row]).double().numpy() for row in per_task]))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).mean().backward()
        optimizer.step()
    return rows


def test_the_summary_is_that_of_numpy() -> None:
    monitor = quiet(every_n_steps=3)
    recorded(monitor)
    measured = rows_by_hand(12)[::3]
    norms = np.array([np.linalg.norm(rows, axis=1) for rows in measured])
    means = np.array([rows.mean(axis=0) for rows in measured])
    mean_norms = np.linalg.norm(means, axis=1)
    cosines = np.array([rows @ mean for rows, mean in zip(measured, means, strict=True)]) / norms / mean_norms[:, None]
    pairwise = np.array([rows @ rows.T / np.outer(n, n) for rows, n in zip(measured, norms, strict=True)])
    smallest = norms.argmin(axis=1)

    summary = monitor.summary
    assert (summary.steps, summary.skipped) == (4, 0)
    for index, task in enumerate(TASKS):
        assert summary.norms[task] == pytest.approx(norms[:, index].mean(), rel=1e-4)
        assert summary.cosines[task] == pytest.approx(cosines[:, index].mean(), abs=1e-4)
        assert summary.conflicts[task] == (cosines[:, index] < 0).mean()
        for other in range(index + 1, len(TASKS)):
            pair = task, TASKS[other]
            assert summary.pairwise_cosines[pair] == pytest.approx(pairwise[:, index, other].mean(), abs=1e-4)
            assert summary.pairwise_conflicts[pair] == (pairwise[:, index, other] < 0).mean()
    assert len(summary.pairwise_cosines) == 3
    assert summary.mean_norm == pytest.approx(mean_norms.mean(), rel=1e-4)
    assert summary.dominated == np.mean([row[index] < 0 for row, index in zip(cosines, smallest, strict=True)])
    assert summary.weak == (pairwise < 0).any(axis=(1, 2)).mean()
    assert summary.weak > 0
    assert 0 < summary.pareto_stationarity < norms.min(axis=1).mean()


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "SI": {"method": ScaleInvariant},
    "FAMO": {"method": partial(FAMO, 3)},
    "RLW": {"method": Random},
    "UPGrad": {"method": UPGrad},
    "PCGrad": {"method": PCGrad},
    "accumulation, clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "UPGrad, accumulation": {"method": UPGrad, "accumulate_grad_batches": 2},
    "features": {"method": UPGrad, "attributes": {"task_gradients_of": "features"}},
    "weights_every": {"method": partial(CAGrad, c=0.4), "attributes": {"weights_every": 4}},
    "features, weights_every": {
        "method": UPGrad,
        "attributes": {"task_gradients_of": "features", "weights_every": 4},
        "accumulate_grad_batches": 2,
    },
    "teleports": {"callback": partial(teleporter, trigger="any", check_every_n_steps=2)},
    "deferred teleports": {"callback": partial(teleporter, trigger="any", check_every_n_steps=2, reevaluate=False)},
    "scaler": {"plugins": scaler_plugins},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_with_it_is_the_run_without_it(name: str) -> None:
    settings = dict(CONFIGURATIONS[name])
    method, attributes = settings.pop("method", lambda: None), settings.pop("attributes", {})
    make_callback, plugins = settings.pop("callback", lambda: None), settings.pop("plugins", None)
    runs = []
    for monitor in (None, quiet(every_n_steps=3)):
        torch.manual_seed(0)
        module = Noisy(method())
        module.make_optimizer = partial(torch.optim.AdamW, lr=1e-2)
        for attribute, value in attributes.items():
            setattr(module, attribute, value)
        cost = make_callback()
        callbacks = [callback for callback in (monitor, cost) if callback is not None]
        if plugins is not None:
            settings["plugins"] = plugins()
        trainer = fit(module, make_batches(20), callbacks=callbacks, **settings)
        runs.append((module, cost, trainer, torch.rand(3)))
    (without, first, before, drawn), (module, second, after, drawn_too) = runs
    assert_same_parameters(module, without)
    assert torch.equal(drawn, drawn_too)
    assert monitor is not None
    assert monitor.summary.steps == len(range(0, after.global_step, 3))
    if isinstance(first, SymmetryTeleportCallback) and isinstance(second, SymmetryTeleportCallback):
        assert sum(report.accepted for report in first.reports) > 0
        assert [report.step for report in second.reports] == [report.step for report in first.reports]
    for (key, value), other in zip(before.callback_metrics.items(), after.callback_metrics.values(), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=0, msg=key, equal_nan=True)


def test_the_loggers_get_every_measured_step(tmp_path: Path) -> None:
    # Lightning's own logs are written at every 50th step only.
    logger = CSVLogger(tmp_path)
    recorded(quiet(every_n_steps=4), logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("conflict/mean_norm")]
    assert [int(row["step"]) for row in rows] == [0, 4, 8]
    first = rows_by_hand(1)[0]
    for index, task in enumerate(TASKS):
        assert float(rows[0][f"conflict/norm/{task}"]) == pytest.approx(np.linalg.norm(first[index]), rel=1e-4)
        assert -1 <= float(rows[0][f"conflict/cosine/{task}"]) <= 1
    assert -1 <= float(rows[0]["conflict/smallest_pairwise_cosine"]) <= 1
    assert float(rows[0]["conflict/pareto_stationarity"]) <= float(rows[0]["conflict/mean_norm"])


def test_a_task_without_labels_is_left_out_of_its_means_only() -> None:
    monitor = quiet(every_n_steps=1)
    torch.manual_seed(0)
    fit(Noisy(), make_batches(9), callbacks=[monitor])
    assert monitor.summary.steps == 9
    assert monitor._sums.means["norm", "right"].count == 6
    assert monitor._sums.means["norm", "left"].count == 9
    assert monitor._sums.means["pairwise_cosine", "left", "ink"].count == 9
    assert "right" in monitor.summary.conflicts


def test_steps_without_two_tasks_are_counted_as_skipped() -> None:
    class Sparse(Net):
        def task_losses(self, batch: Batch, batch_idx: int) -> Any:
            losses = self.losses(batch)
            return losses if batch_idx % 2 == 0 else {**losses, "right": None, "ink": None}

    monitor = quiet(every_n_steps=1)
    fit(Sparse(), make_batches(6), callbacks=[monitor])
    assert (monitor.summary.steps, monitor.summary.skipped) == (3, 3)


def test_a_step_that_the_scaler_skips_is_not_measured() -> None:
    monitor = quiet(every_n_steps=1)
    batches = make_batches(4)
    batches[1]["left"][0] = torch.inf
    trainer = fit(Net(), batches, callbacks=[monitor], plugins=scaler_plugins())
    assert trainer.global_step == 4
    assert (monitor.summary.steps, monitor.summary.skipped) == (3, 1)


def test_a_resumed_fit_goes_on_with_the_sums(tmp_path: Path) -> None:
    whole, half, rest = quiet(every_n_steps=2), quiet(every_n_steps=2), quiet(every_n_steps=2)
    recorded(whole, max_epochs=2)
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="first", save_on_train_epoch_end=True)
    module = Net(scales=SCALES)
    fit(module, make_batches(12), callbacks=[half, checkpoint], enable_checkpointing=True)
    assert half.summary.steps == 6
    torch.load(tmp_path / "first.ckpt", weights_only=True)
    resumed = Net(scales=SCALES)
    fit(resumed, make_batches(12), ckpt_path=tmp_path / "first.ckpt", callbacks=[rest], max_epochs=2)
    assert rest.summary == whole.summary


def test_the_table_says_who_conflicts(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = ConflictMonitor(every_n_steps=2)
    recorded(monitor)
    printed = capsys.readouterr().out
    assert "Conflict in 6 steps" in printed
    for task in TASKS:
        assert task in printed
    assert "Pareto" in printed
    recorded(quiet())
    assert "Conflict in" not in capsys.readouterr().out


def test_a_summary_of_nothing_is_nan_and_can_be_shown() -> None:
    summary = quiet().summary
    assert summary.steps == 0
    assert np.isnan([summary.dominated, summary.weak, summary.mean_norm, summary.pareto_stationarity]).all()
    rich.get_console().render_str(str(summary))
    with pytest.raises(ValueError, match="no steps"):
        conflict_heat_map({"nothing": summary})


def test_both_ranks_measure_what_one_process_measures(ranks: RankPool) -> None:
    (first, lines), (second, silent) = ranks.run(watched)
    alone, _ = watched(0, size=1)
    assert first == second
    assert lines > 0 == silent
    for name, value in alone.items():
        assert first[name] == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_what_it_cannot_measure_is_refused() -> None:
    class Manual(Net):
        automatic_optimization = False

    with pytest.raises(
        MisconfigurationException, match="ConflictMonitor needs a module that subclasses MultiTaskMixin"
    ):
        fit(PlainNet(), make_batches(2), callbacks=[quiet()])
    with pytest.raises(MisconfigurationException, match="ConflictMonitor"):
        fit(Manual(), make_batches(2), callbacks=[quiet()])
    with pytest.raises(MisconfigurationException, match="at least 2 tasks; `task_losses` returned 'left'"):
        fit(Net(tasks=("left",)), make_batches(2), callbacks=[quiet()])


@pytest.mark.parametrize(("argument", "value"), [("every_n_steps", 0), ("every_n_steps", 1.5), ("table", "yes")])
def test_bad_arguments_are_refused_by_name(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        ConflictMonitor(**{argument: value})
