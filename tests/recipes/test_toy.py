"""The two-parameter problem: its losses and front against numbers by hand, and who gets stuck in it."""

import math

import pytest
import torch

from lightning_cost import SymmetryTeleportCallback
from recipes.toy import STARTS, ToyModel, gap_to_front, pareto_front, pareto_stationarity, toy_losses, train
from recipes.toy.__main__ import main

pytestmark = pytest.mark.slow

STUCK = (STARTS[0], STARTS[2])
# At this learning rate the runs are short, and LS leaves the valleys after 1100 steps at the earliest.
STEPS, LR = 900, 0.02


def point(t1, t2):
    return torch.tensor([t1, t2], dtype=torch.float64)


def grid(num):
    ticks = torch.linspace(-11, 11, num, dtype=torch.float64)
    return torch.cartesian_prod(ticks, ticks)


@pytest.mark.parametrize(
    ("t1", "t2", "expected"),
    [
        # tanh(ln 3) = 4/5 and tanh(ln 3 / 2) = 1/2. The logarithms are of 0 + 4/5 and of 5 - 4/5 + 2.
        (-7, math.log(3), ((math.log(0.8) + 6) / 2, (math.log(6.2) + 6) / 2)),
        # The bottom of the first valley, at -7 + 2 * 4/5. The other logarithm is of 4.2 - 4/5 + 2.
        (-5.4, math.log(3), ((math.log(5e-6) + 6) / 2, (math.log(5.4) + 6) / 2)),
        # The bottom of the second, at 7 - 2 * 4/5. The other logarithm is of |-6.2 + 4/5|.
        (5.4, math.log(3), ((math.log(5.4) + 6) / 2, (math.log(5e-6) + 6) / 2)),
        (3, 0, (0, 0)),
        # tanh(ln 2 / 2) = 1/3. The squares are of 6 and -8 along t1, and of 8 - ln 2 along t2, which counts a tenth.
        (1, -math.log(2), tuple((square / 10 + (8 - math.log(2)) ** 2 / 100 - 20) / 3 for square in (36, 64))),
    ],
)
def test_losses_by_hand(t1, t2, expected):
    assert toy_losses(point(t1, t2)).tolist() == pytest.approx(expected, abs=1e-9)


def test_losses_of_many_points_are_those_of_each():
    points = grid(7).reshape(7, 7, 2)
    assert torch.equal(toy_losses(points)[3, 5], toy_losses(points[3, 5]))


def test_nothing_lowers_both_losses_on_the_front():
    everywhere = toy_losses(grid(500))
    for here in toy_losses(pareto_front()[::100]):
        assert not (everywhere < here).all(-1).any()


def test_front_has_the_minima_of_both_losses_and_their_mean():
    losses, everywhere = toy_losses(pareto_front()), toy_losses(grid(1101))
    assert losses[-1, 0].item() == pytest.approx(everywhere[:, 0].min().item(), abs=1e-3)
    assert losses[0, 1].item() == pytest.approx(everywhere[:, 1].min().item(), abs=1e-3)
    assert losses.mean(-1).min().item() == pytest.approx(everywhere.mean(-1).min().item(), abs=1e-3)
    # Where CAGrad's own figure draws it.
    assert pareto_front()[losses.mean(-1).argmin()].tolist() == pytest.approx([0, -8.3552], abs=2e-4)


@pytest.mark.parametrize("here", [(-5.0, 2.0), (9.0, 9.0), (-8.5, -5.0), (3.0, -6.0), (-10.5, -9.0)])
def test_gap_is_the_largest_fall_of_both_losses_that_the_front_offers(here):
    falls = (toy_losses(point(*here)) - toy_losses(pareto_front())).amin(-1)
    assert gap_to_front(point(*here)) == pytest.approx(falls.max().item(), abs=0.01)
    assert falls.max() > 0.05


def test_gap_is_zero_on_the_front():
    assert [gap_to_front(here) for here in pareto_front()[::100]] == pytest.approx([0] * 21, abs=1e-9)


def test_the_front_is_pareto_stationary_and_nothing_near_it_is():
    assert [pareto_stationarity(here) for here in pareto_front()[::100]] == pytest.approx([0] * 21, abs=1e-6)
    # Midway between two bowls the gradients are mirror images, so their mean is the shortest combination.
    height = -5.0
    fade = math.tanh(2.5)
    slope = 0.02 * (height + 8) * fade - 0.5 * (1 - fade**2) * (4.9 - 20 + 0.01 * (height + 8) ** 2)
    assert pareto_stationarity(point(0, height)) == pytest.approx(abs(slope))
    assert all(pareto_stationarity(point(*start)) > 0.05 for start in STARTS)


@pytest.mark.parametrize("start", STUCK)
def test_ls_is_stuck(start):
    run = train(ToyModel(start, lr=LR), STEPS)
    assert run.steps == STEPS
    assert run.points[0].tolist() == list(start)
    assert run.points[:, 1].min() > 0
    assert min(run.gaps) > 10
    assert not run.reached
    assert len(run.jumps) == 0


@pytest.mark.parametrize("start", STARTS)
def test_cost_that_holds_the_mean_reaches_the_front(start):
    run = train(ToyModel(start, lr=LR), STEPS, SymmetryTeleportCallback(invariance="mean", start_epoch=0))
    assert run.reached
    assert run.steps < STEPS
    assert len(run.jumps) == sum(report.accepted for report in run.reports) > 0
    before, after = toy_losses(run.jumps.double()).mean(-1).unbind(1)
    assert ((after - before).abs() <= 0.0201 * before.abs()).all()


def test_the_search_of_the_paper_reaches_the_front_and_its_loss_may_rise():
    paper = SymmetryTeleportCallback.paper(start_epoch=0, max_per_epoch=None, check_every_n_steps=10, invariance="mean")
    run = train(ToyModel(STUCK[1]), 1300, paper)
    assert run.reached
    means = [sum(r.losses_after.values()) / 2 - sum(r.losses_before.values()) / 2 for r in run.reports if r.accepted]
    assert run.largest_rise == pytest.approx(max(means), abs=1e-4)
    assert run.largest_rise > 0.01


def test_holding_both_losses_leaves_no_direction():
    start = STUCK[0]
    alone = train(ToyModel(start, lr=LR), 250)
    run = train(ToyModel(start, lr=LR), 250, SymmetryTeleportCallback(start_epoch=0))
    assert run.reports
    assert {report.reason for report in run.reports} == {"the objective has no direction on the level set"}
    assert torch.equal(run.points, alone.points)


def test_main_writes_the_figure_and_a_row_for_each_method(tmp_path, capsys):
    main(["--output", str(tmp_path / "new"), "--steps", "3", "--controls"])
    assert (tmp_path / "new" / "trajectories.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(start in printed for start in ("(-8.5, 7.5)", "(-8.5, -5)", "(9, 9)"))
    assert all(
        printed.count(f"{method} ") >= len(STARTS)
        for method in ("LS", "+ COST", "per_task", "paper", "random", "reversed")
    )


def test_seed_shifts_the_starts(tmp_path, capsys):
    printed = []
    for seed in ("1", "2"):
        main(["--output", str(tmp_path), "--steps", "1", "--seed", seed])
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]
    assert not any("(9, 9)" in table for table in printed)


def test_main_refuses_no_steps(capsys):
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "must be at least 1; got 0" in capsys.readouterr().err
