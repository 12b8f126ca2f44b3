"""Two processes with half batches train like one process with whole batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torchjd.aggregation import FairGrad, GradDrop, PCGrad, UPGrad
from torchjd.scalarization import DWA, FAMO, STCH, UW, Random

from lightning_cost import ScaleInvariant
from lightning_cost.searches import PenaltySearch
from tests.support.ddp_runs import (
    BatchNet,
    BranchNet,
    ChecksOnFirstRank,
    Compressing,
    FrozenHeads,
    IdleNet,
    LateNet,
    MissingNet,
    NormNet,
    OrderNet,
    RankDirection,
    RankValue,
    Run,
    alone,
    fires_on_first_rank_only,
    fires_on_second_rank_only,
    none,
    resumed,
    scaler_plugins,
    train,
    train_until_fault,
    warned,
)
from tests.support.nets import Net
from tests.support.ranks import RankPool
from tests.support.teleporting import assert_same, teleporter

pytestmark = pytest.mark.slow

LEVEL_SET = partial(teleporter, check_every_n_steps=5)
PENALTY = partial(teleporter, check_every_n_steps=5, search=PenaltySearch(steps=3, lr=1e-3))


def assert_ranks_agree(results: list[dict[str, Any]]) -> dict[str, Any]:
    first, *others = results
    for other in others:
        assert_same(other["parameters"], first["parameters"])
        assert_same(other["reports"], first["reports"])
        assert_same(other["rates"], first["rates"])
    return first


def accepted(result: dict[str, Any]) -> int:
    return sum(report["accepted"] for report in result["reports"])


@pytest.mark.parametrize("net", [Net, NormNet])
@pytest.mark.parametrize("callback", [LEVEL_SET, PENALTY], ids=["level_set", "penalty"])
@pytest.mark.parametrize("method", [none, UPGrad, partial(FairGrad, alpha=2.0)], ids=["mean", "upgrad", "fairgrad"])
def test_two_ranks_equal_one_process(ranks: RankPool, method: Any, callback: Any, net: Any) -> None:
    run = Run(method, net, callback)
    both, single = assert_ranks_agree(ranks.run(train, run)), alone(run)
    assert accepted(both) == accepted(single) >= 3
    assert_close(both["parameters"], single["parameters"], rtol=0, atol=1e-5)
    assert_close(both["buffers"], single["buffers"], rtol=0, atol=1e-5)
    for one, other in zip(both["reports"], single["reports"], strict=True):
        for key in ("losses_before", "losses_after", "cosines_before", "cosines_after"):
            assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)
        assert one["drift"] <= 0.02


@pytest.mark.parametrize(
    "strategy",
    [
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
        {"bucket_cap_mb": 0.0001},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [none, UPGrad])
def test_every_kind_of_ddp_is_the_same(ranks: RankPool, method: Any, strategy: dict[str, Any]) -> None:
    plain, other = (assert_ranks_agree(ranks.run(train, Run(method, strategy=kind))) for kind in ({}, strategy))
    assert accepted(plain) >= 3
    assert_close(other["parameters"], plain["parameters"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [none, UPGrad])
def test_accumulated_batches_and_an_incomplete_window(ranks: RankPool, method: Any) -> None:
    callback = partial(teleporter, check_every_n_steps=1)
    run = Run(method, callback=callback, trainer={"accumulate_grad_batches": 3})
    both, single = assert_ranks_agree(ranks.run(train, run)), alone(run)
    assert both["steps"] == single["steps"] == 7
    assert accepted(both) == accepted(single) >= 3
    assert_close(both["parameters"], single["parameters"], rtol=0, atol=1e-5)


def test_a_gradient_scaler_and_clipping(ranks: RankPool) -> None:
    run = Run(UPGrad, trainer={"gradient_clip_val": 0.1}, plugins=scaler_plugins)
    both, single = assert_ranks_agree(ranks.run(train, run)), alone(run)
    assert accepted(both) >= 3
    assert_close(both["parameters"], single["parameters"], rtol=0, atol=0.02)


def test_parameters_that_only_some_ranks_and_tasks_use(ranks: RankPool) -> None:
    runs = [
        Run(UPGrad, BranchNet, strategy={"find_unused_parameters": True}, optimizer=partial(torch.optim.SGD, lr=0.1)),
        Run(none, BranchNet, strategy={"find_unused_parameters": True}, optimizer=partial(torch.optim.SGD, lr=0.1)),
    ]
    for run in runs:
        result = assert_ranks_agree(ranks.run(train, run))
        assert accepted(result) >= 3


def test_nothing_is_to_be_synchronized_that_is_not(ranks: RankPool) -> None:
    for messages in ranks.run(warned, Run(UPGrad)):
        assert not [message for message in messages if "sync_dist" in message]


@pytest.mark.parametrize("method", [PCGrad, GradDrop])
def test_methods_that_draw_random_numbers_keep_the_ranks_together(ranks: RankPool, method: Any) -> None:
    assert_ranks_agree(ranks.run(train, Run(method, callback=none)))


def test_the_first_rank_decides_for_all(ranks: RankPool) -> None:
    for trigger, fires in ((fires_on_first_rank_only, True), (fires_on_second_rank_only, False)):
        callback = partial(teleporter, trigger=trigger, check_every_n_steps=5)
        result = assert_ranks_agree(ranks.run(train, Run(UPGrad, callback=callback)))
        assert (len(result["reports"]) == 4) == fires
    callback = partial(ChecksOnFirstRank, trigger=fires_on_first_rank_only, start_epoch=0)
    assert len(assert_ranks_agree(ranks.run(train, Run(UPGrad, callback=callback)))["reports"]) == 4


def test_the_order_of_the_tasks_is_that_of_the_first_rank(ranks: RankPool) -> None:
    ordered, other = (assert_ranks_agree(ranks.run(train, Run(UPGrad, net))) for net in (Net, OrderNet))
    assert_same(other["parameters"], ordered["parameters"])


def without_counts(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A process without a task differentiates less."""
    for report in (report for result in results for report in result["reports"]):
        del report["backwards"]
    return results


@pytest.mark.parametrize(
    "method",
    [none, UPGrad, partial(UW, 3), partial(FAMO, 3), partial(STCH, 1.0)],
    ids=["LS", "UPGrad", "UW", "FAMO", "STCH"],
)
@pytest.mark.parametrize("callback", [none, LEVEL_SET], ids=["plain", "teleports"])
def test_a_process_may_lack_a_task(ranks: RankPool, method: Any, callback: Any) -> None:
    run = Run(method, MissingNet, callback=callback)
    result, expected = assert_ranks_agree(without_counts(ranks.run(train, run))), alone(run)
    assert result["steps"] == expected["steps"]
    for name, value in expected["parameters"].items():
        assert_close(result["parameters"][name], value, rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", [none, UPGrad, partial(UW, 3), partial(FAMO, 3)], ids=["LS", "UPGrad", "UW", "FAMO"])
def test_a_process_may_lack_all_tasks(ranks: RankPool, method: Any) -> None:
    assert assert_ranks_agree(without_counts(ranks.run(train, Run(method, IdleNet))))["steps"] == 20


def test_a_task_that_no_process_had_in_the_first_batch_is_refused(ranks: RankPool) -> None:
    for outcome in ranks.outcomes(train, Run(UPGrad, LateNet)):
        assert "returned 'new' after the first batch, where no process had it" in outcome.message


def test_ranks_that_disagree_about_a_point_are_noticed(ranks: RankPool) -> None:
    callback = partial(teleporter, objective=RankValue())
    for outcome in ranks.outcomes(train, Run(UPGrad, callback=callback)):
        assert "Some processes accept a point and others refuse it" in outcome.message


def test_ranks_that_move_apart_are_noticed(ranks: RankPool) -> None:
    callback = partial(teleporter, objective=RankDirection(), tolerance=None)
    for outcome in ranks.outcomes(train, Run(UPGrad, callback=callback)):
        assert outcome.kind == "RuntimeError"
        assert "differ between the processes after a teleport" in outcome.message
    unchecked = partial(teleporter, objective=RankDirection(), tolerance=None, check_ranks=False)
    first, second = ranks.run(train, Run(UPGrad, callback=unchecked))
    assert any(not torch.equal(first["parameters"][name], second["parameters"][name]) for name in first["parameters"])


SCALARIZERS: dict[str, Any] = {
    "SI": ScaleInvariant,
    "RLW": Random,
    "DWA": DWA,
    "UW": partial(UW, 3),
    "FAMO": partial(FAMO, 3, lr=0.05),
    "STCH": partial(STCH, 0.5),
}


@pytest.mark.parametrize("callback", [none, LEVEL_SET], ids=["plain", "teleports"])
@pytest.mark.parametrize("name", SCALARIZERS)
def test_methods_see_the_losses_of_all_ranks(ranks: RankPool, name: str, callback: Any) -> None:
    """What they remember as well: four epochs of five steps, of which DWA weighs the last two."""
    run = Run(SCALARIZERS[name], BatchNet, callback, trainer={"max_epochs": 4, "limit_train_batches": 5})
    both, single = assert_ranks_agree(ranks.run(train, run)), alone(run)
    assert_close(both["parameters"], single["parameters"], rtol=0, atol=1e-5)
    assert accepted(both) == accepted(single) >= (0 if callback is none else 3)
    if name in {"UW", "FAMO"}:
        assert all((both["parameters"][key] != 0).all() for key in both["parameters"] if key.startswith("mtl_method"))


def test_famo_with_accumulated_batches_on_two_ranks(ranks: RankPool) -> None:
    """The scalarization is that of each batch, the losses that weigh the tasks are those of the window."""
    run = Run(SCALARIZERS["FAMO"], BatchNet, trainer={"accumulate_grad_batches": 3})
    both, single = assert_ranks_agree(ranks.run(train, run)), alone(run)
    assert_close(both["parameters"], single["parameters"], rtol=0, atol=1e-5)


def test_ddp_does_not_wait_for_weights_that_a_method_learns_itself(ranks: RankPool) -> None:
    run = Run(SCALARIZERS["FAMO"], strategy={"static_graph": True})
    assert accepted(assert_ranks_agree(ranks.run(train, run))) >= 3


@pytest.mark.parametrize("at", [1, 3])
def test_a_fault_on_one_rank_fails_on_all_with_a_method_that_communicates(ranks: RankPool, at: int) -> None:
    first, second = ranks.run(train_until_fault, at, ScaleInvariant)
    assert "Another process failed" in first["error"]
    assert "a fault on one rank" in second["error"]
    assert first["same"]
    assert second["same"]


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_fault_on_one_rank_fails_on_all_and_moves_none(ranks: RankPool, at: int) -> None:
    first, second = ranks.run(train_until_fault, at)
    assert "Another process failed" in first["error"]
    assert "a fault on one rank" in second["error"]
    for outcome in (first, second):
        assert outcome["same"]
        assert outcome["reason"] in outcome["error"] or outcome["reason"].split(":")[0] in outcome["error"]


def test_rows_are_sent_in_half_precision_on_request(ranks: RankPool) -> None:
    exact, rounded = (
        assert_ranks_agree(ranks.run(train, Run(UPGrad, attributes={"reduce_dtype": dtype})))
        for dtype in (None, torch.bfloat16)
    )
    differences = [
        float((rounded["parameters"][name] - exact["parameters"][name]).abs().max()) for name in exact["parameters"]
    ]
    assert 1e-6 < max(differences) < 0.05


def test_a_communication_hook_leaves_the_rows_exact(ranks: RankPool) -> None:
    run = partial(Run, callback=none, optimizer=partial(torch.optim.SGD, lr=0.1))
    for method, rounded in ((UPGrad, False), (none, True)):
        # With the heads frozen, all that an aggregator uses of `.grad` would be what a row is subtracted from.
        exact, hooked = (
            assert_ranks_agree(ranks.run(train, run(method, FrozenHeads, trainer={"callbacks": callbacks})))
            for callbacks in ([], [Compressing()])
        )
        differences = [
            float((hooked["parameters"][name] - exact["parameters"][name]).abs().max()) for name in exact["parameters"]
        ]
        assert (max(differences) > 1e-4) == rounded
        assert max(differences) < (0.05 if rounded else 1e-6)


@pytest.mark.parametrize("method", [UPGrad, SCALARIZERS["FAMO"]])
def test_resume_in_the_middle_of_an_epoch(ranks: RankPool, method: Any, tmp_path: Path) -> None:
    for whole, continued in ranks.run(resumed, str(tmp_path / "middle.ckpt"), method):
        assert sum(report["accepted"] for report in whole["reports"]) >= 3
        assert_same(continued["parameters"], whole["parameters"])
        assert_same(continued["reports"], whole["reports"])
