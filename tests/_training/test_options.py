"""What a module may ask of its aggregator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torchjd.aggregation import ConFIG, ExcessMTL, GradDrop, NashMTL, Random, UPGrad

from lightning_cost._training.options import check_options
from tests.support.nets import Net, fit, make_batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_gradients_of": "outputs"}, "must be 'parameters' or 'features'; got 'outputs'"),
        ({"weights_every": 0}, "`weights_every` of Net must be a positive integer; got 0"),
        ({"weights_every": True}, "`weights_every` of Net must be a positive integer; got True"),
        ({"weights_every": 2, "mtl_method": None}, "`weights_every=2` of Net has no effect"),
        ({"weights_every": 2, "mtl_method": GradDrop()}, "GradDrop combines the task gradients by more than weights"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    module = Net(UPGrad())
    for name, value in options.items():
        setattr(module, name, value)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, make_batches(1))


@pytest.mark.parametrize(
    ("method", "several"),
    [
        (UPGrad(), True),
        (GradDrop(), True),
        (Random(), True),
        (NashMTL(3), False),
        (ConFIG(), False),
        (ExcessMTL(), False),
    ],
    ids=str,
)
def test_features_of_several_processes_take_methods_that_need_inner_products_only(method: Any, several: bool) -> None:
    kind = type(method).__name__
    for size in (1, 2):
        module = SimpleNamespace(
            mtl_method=method,
            task_gradients_of="features",
            weights_every=1,
            reduce_dtype=None,
            trainer=SimpleNamespace(world_size=size),
        )
        if size == 1 or several:
            check_options(module)
        else:
            with pytest.raises(MisconfigurationException, match=f"with 2 processes .* {kind} needs more"):
                check_options(module)
