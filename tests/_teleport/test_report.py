"""Reports of teleports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_cost import Outcome, Point, TaskGradients, TeleportReport
from lightning_cost._teleport.report import append_report, report_of_outcome, report_of_start, without_traces
from tests.support.nets import Net, fit, make_batches
from tests.support.teleporting import Spy, teleporter


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


def report_of(step: int) -> TeleportReport:
    point = Point(torch.tensor([1.0, 2.0]), TaskGradients(["left", "right"], torch.eye(2)))
    outcome = Outcome(True, "accepted", point, point, trace=[{"stage": "start", "drift": 0.0}])
    return report_of_outcome(report_of_start(point, step, epoch=1), outcome, "per_task")


def test_only_the_last_ten_reports_keep_their_traces() -> None:
    reports: list[TeleportReport] = []
    held = []
    for step in range(25):
        held.append(report_of(step))
        append_report(reports, held[-1])
        assert [bool(report.trace) for report in reports] == [False] * (step - 9) + [True] * min(step + 1, 10)
    assert [report.step for report in reports] == list(range(25))
    # Somebody who holds a report still has its trace; all else is the same.
    assert all(report.trace == [{"stage": "start", "drift": 0.0}] for report in held)
    assert [replace(report, trace=[]) for report in held] == [replace(report, trace=[]) for report in reports]


def test_checkpoints_hold_reports_without_traces() -> None:
    reports = [report_of(0)]
    (plain,) = without_traces(reports)
    assert plain["trace"] == []
    assert TeleportReport(**plain) == replace(reports[0], trace=[])
    assert reports[0].trace


def test_a_report_has_the_figures_of_its_outcome() -> None:
    start = Point(torch.tensor([1.0, 2.0]), TaskGradients(["left", "right"], torch.tensor([[3.0, 0.0], [0.0, 4.0]])))
    end = Point(torch.tensor([1.1, 1.9]), TaskGradients(["left", "right"], torch.tensor([[3.0, 0.0], [3.0, 0.0]])))
    outcome = Outcome(True, "accepted", start, end, sigma=0.25, forwards=2, backwards=3)
    started = report_of_start(start, step=7, epoch=1)
    found = report_of_outcome(started, outcome, "per_task")
    assert (found.step, found.epoch, found.accepted, found.reason) == (7, 1, True, "accepted")
    assert found.sigma == 0.25
    assert found.losses_before == {"left": 1.0, "right": 2.0}
    assert found.losses_after == pytest.approx({"left": 1.1, "right": 1.9})
    assert found.cosines_before == pytest.approx({"left": 0.6, "right": 0.8})
    assert found.cosines_after == pytest.approx({"left": 1.0, "right": 1.0})
    assert (found.grad_norm_before, found.grad_norm_after) == pytest.approx((2.5, 3.0))
    assert found.drift == pytest.approx(0.1)
    assert report_of_outcome(started, outcome, "mean").drift == pytest.approx(0.0, abs=1e-6)
    # The report of the start is what an exception leaves.
    assert (started.accepted, started.losses_after, started.drift) == (False, started.losses_before, 0.0)
    assert started.cosines_after == started.cosines_before
