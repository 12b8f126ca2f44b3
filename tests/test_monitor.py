"""The monitor measures what NumPy measures. That it leaves the run alone: `trainers/test_monitored_runs.py`."""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import rich
import rich.console
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torchjd.aggregation import UPGrad

from lightning_cost import ConflictMonitor
from lightning_cost.plots import conflict_heat_map
from tests.support.ddp_runs import scaler_plugins, watched
from tests.support.nets import TASKS, Batch, Net, PlainNet, fit, make_batches
from tests.support.ranks import RankPool
from tests.support.teleporting import teleporter

SCALES = (1.0, 5.0, 0.1)
quiet = partial(ConflictMonitor, table=False)


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

    class Unlabelled(Net):
        def task_losses(self, batch: Batch, batch_idx: int) -> Any:
            losses = self.losses(batch)
            return losses if batch_idx % 3 else {**losses, "right": None}

    fit(Unlabelled(), make_batches(9), callbacks=[monitor])
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


@pytest.mark.slow
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
    with pytest.raises(RuntimeError, match="same type"):
        fit(Net(), make_batches(2), callbacks=[quiet(), quiet(every_n_steps=2)])


def test_a_run_that_never_has_two_tasks_is_told_so() -> None:
    monitor = quiet(every_n_steps=1)
    with pytest.warns(UserWarning, match="measured nothing: none of the 2 steps .* The tasks are 'left'"):
        fit(Net(tasks=("left",)), make_batches(2), callbacks=[monitor])
    assert (monitor.summary.steps, monitor.summary.skipped) == (0, 2)


def test_tasks_may_appear_later() -> None:
    class Growing(Net):
        def task_losses(self, batch: Batch, batch_idx: int) -> Any:
            losses = self.losses(batch)
            return losses if batch_idx else {"left": losses["left"]}

    monitor = quiet(every_n_steps=1)
    with pytest.warns(UserWarning, match="for the first time"):
        fit(Growing(), make_batches(3), callbacks=[monitor])
    assert (monitor.summary.steps, monitor.summary.skipped) == (2, 1)


def test_steps_without_a_trained_shared_parameter_are_skipped() -> None:
    monitor, module = quiet(every_n_steps=1), Net()
    module.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match="measured nothing"):
        fit(module, make_batches(2), callbacks=[monitor])
    assert monitor.summary.skipped == 2


@pytest.mark.parametrize("method", [None, UPGrad])
def test_a_step_without_a_batch_is_not_measured_again(method: Any) -> None:
    class Skipping(Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    monitor = quiet(every_n_steps=1)
    fit(Skipping(method and method()), make_batches(6), callbacks=[monitor])
    assert (monitor.summary.steps, monitor.summary.skipped) == (3, 3)


def test_tasks_in_another_order_are_the_same_tasks() -> None:
    monitor = quiet(every_n_steps=1)
    fit(Net(), make_batches(2), callbacks=[monitor])
    fit(Net(tasks=TASKS[::-1]), make_batches(2), callbacks=[monitor])
    assert len(monitor.summary.pairwise_cosines) == 3
    assert {mean.count for mean in monitor._sums.means.values()} == {4}


def test_one_monitor_before_the_teleports_and_one_after_them(tmp_path: Path) -> None:
    before, after = quiet(every_n_steps=1), quiet(every_n_steps=1, name="after")
    cost, logger = teleporter(), CSVLogger(tmp_path)
    torch.manual_seed(0)
    module = Net(scales=SCALES)
    trainer = fit(module, make_batches(6), callbacks=[before, cost, after], logger=logger)
    accepted = [report for report in cost.reports if report.accepted]
    assert accepted
    assert before.summary.steps == after.summary.steps == 6
    assert before.summary.mean_norm != after.summary.mean_norm
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"conflict/mean_norm", "after/mean_norm"} <= set(header)
    keys = {before.state_key, after.state_key}
    assert len(keys & trainer._checkpoint_connector.dump_checkpoint()["callbacks"].keys()) == 2


def test_names_are_shown_as_they_are_on_any_terminal() -> None:
    monitor = quiet(every_n_steps=1)
    tasks = ("[red]left", "[/]", "größe")
    fit(Net(tasks=tasks), make_batches(2, tasks), callbacks=[monitor])
    for encoding, name in (("utf-8", "größe"), ("ascii", r"gr\xf6\xdfe")):
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding=encoding)
        rich.console.Console(file=file, width=200).print(monitor.summary)
        file.flush()
        shown = raw.getvalue().decode(encoding)
        for text in ("[red]left", "[/]", name):
            assert text in shown


@pytest.mark.parametrize(
    ("argument", "value"), [("every_n_steps", 0), ("every_n_steps", 1.5), ("table", "yes"), ("name", 3)]
)
def test_bad_arguments_are_refused_by_name(argument: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=argument):
        ConflictMonitor(**{argument: value})
