"""Reports of teleports."""

from __future__ import annotations

import pytest
import torch

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
