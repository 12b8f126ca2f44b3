"""The scale-invariant method."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from lightning_cost import ScaleInvariant
from tests.support.nets import Net, fit, make_batches


def test_scale_invariant_weighs_by_the_inverse_of_a_loss() -> None:
    batch, scales = make_batches(1), (1.0, 1e3, 1e-3)
    steps = []
    for module in (Net(ScaleInvariant()), Net(ScaleInvariant(), scales=scales)):
        fit(module, batch)
        steps.append({name: value.detach() for name, value in module.named_parameters()})
    assert_close(*steps, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"all must be positive; got \[1\.0, -2\.0\]"):
        ScaleInvariant()(torch.tensor([1.0, -2.0]))
