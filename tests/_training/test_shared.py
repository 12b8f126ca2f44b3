"""Which modules and parameters are shared."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torchjd.aggregation import UPGrad

from tests.support.nets import Net, fit, make_batches


@pytest.mark.parametrize(
    ("shared_module", "message"),
    [
        ("encoder", "Net has no attribute 'encoder'"),
        ("backbone.7", "Net has no attribute 'backbone.7'"),
        (["backbone", "encoder"], "Net has no attribute 'encoder'"),
        ("scales", "'scales' must be a torch.nn.Module; got dict"),
        ("backbone.0.weight", "'backbone.0.weight' must be a torch.nn.Module; got Parameter"),
        ([], r"`shared_module=\[\]` of Net has no parameters"),
        ("backbone.1", "`shared_module='backbone.1'` of Net has no parameters"),
        (None, "must be the name of the attribute that holds the shared module.*got None"),
        (nn.Linear(2, 2), "must be the name of the attribute that holds the shared module.*got Linear"),
    ],
)
def test_a_wrong_shared_module_is_refused(shared_module: Any, message: str) -> None:
    module = Net(UPGrad())
    module.shared_module = shared_module
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, make_batches(1))


@pytest.mark.parametrize("name", ["task_losses", "task_gradients", "request_task_gradients", "replaying"])
def test_a_submodule_with_a_name_of_the_mixin_is_refused(name: str) -> None:
    module = Net()
    module._modules[name] = nn.Identity()
    with pytest.raises(MisconfigurationException, match=f"registers a submodule, parameter or buffer as `{name}`"):
        fit(module, make_batches(1))
