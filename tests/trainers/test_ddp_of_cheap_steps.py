"""Two processes with half batches train like one with whole batches: features, reused weights, deferred teleports."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from torch.testing import assert_close
from torchjd.aggregation import MGDA, GradDrop, UPGrad
from torchjd.scalarization import FAMO

from tests.support.ddp_runs import IdleNet, MissingNet, NormNet, Run, alone, none, scaler_plugins, train
from tests.support.nets import Net
from tests.support.ranks import RankPool
from tests.support.teleporting import assert_same, teleporter

pytestmark = pytest.mark.slow

DEFERRED = partial(teleporter, check_every_n_steps=5, reevaluate=False)
FEATURES = {"task_gradients_of": "features"}
EVERY_THIRD = {"weights_every": 3}


def both_of(ranks: RankPool, run: Run) -> dict[str, Any]:
    first, second = ranks.run(train, run)
    assert_same(second["parameters"], first["parameters"])
    assert_same(second["reports"], first["reports"])
    return first


@pytest.mark.parametrize("net", [Net, NormNet])
@pytest.mark.parametrize(
    ("method", "attributes", "callback"),
    [
        (none, {}, DEFERRED),
        (partial(FAMO, 3), {}, DEFERRED),
        (UPGrad, FEATURES, none),
        (MGDA, FEATURES, DEFERRED),
        (UPGrad, EVERY_THIRD, DEFERRED),
        (UPGrad, {**FEATURES, **EVERY_THIRD}, partial(teleporter, check_every_n_steps=5)),
    ],
    ids=["deferred", "deferred, FAMO", "features", "features, deferred", "weights, deferred", "all, re-evaluated"],
)
def test_two_ranks_equal_one_process(ranks: RankPool, method: Any, attributes: Any, callback: Any, net: Any) -> None:
    run = Run(method, net, callback, attributes=attributes)
    both, single = both_of(ranks, run), alone(run)
    assert len(both["reports"]) == len(single["reports"])
    assert_close(both["parameters"], single["parameters"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("strategy", [{"find_unused_parameters": True}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("attributes", [FEATURES, EVERY_THIRD], ids=str)
def test_every_kind_of_ddp_is_the_same(ranks: RankPool, attributes: Any, strategy: Any) -> None:
    plain, other = (
        both_of(ranks, Run(UPGrad, callback=none, attributes=attributes, strategy=kind)) for kind in ({}, strategy)
    )
    assert_close(other["parameters"], plain["parameters"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("attributes", [FEATURES, EVERY_THIRD], ids=str)
def test_a_process_may_lack_a_task_or_all(ranks: RankPool, attributes: Any) -> None:
    run = Run(UPGrad, MissingNet, none, attributes=attributes)
    both, single = both_of(ranks, run), alone(run)
    assert_close(both["parameters"], single["parameters"], rtol=0, atol=2e-4)
    assert both_of(ranks, Run(UPGrad, IdleNet, none, attributes=attributes))["steps"] == 20


@pytest.mark.parametrize("attributes", [FEATURES, EVERY_THIRD], ids=str)
def test_a_gradient_scaler_accumulation_and_clipping(ranks: RankPool, attributes: Any) -> None:
    settings = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    run = Run(UPGrad, callback=DEFERRED, trainer=settings, plugins=scaler_plugins, attributes=attributes)
    both, single = both_of(ranks, run), alone(run)
    assert_close(both["parameters"], single["parameters"], rtol=0, atol=0.02)


def test_random_numbers_of_the_ranks_do_not_part_them(ranks: RankPool) -> None:
    both_of(ranks, Run(GradDrop, callback=none, attributes=FEATURES))
