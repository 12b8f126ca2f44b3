"""The figures of the paper that need runs of their own: what is counted, what is drawn, and the commands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from math import isnan, nan
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch

from lightning_cost import TeleportReport
from lightning_cost.gradients import TaskGradients
from lightning_cost.triggers import Majority, any_conflict
from recipes.common.training import Look
from recipes.figures.__main__ import main
from recipes.figures.loss_levels import TOLERANCE, Levels, loss_levels
from recipes.figures.relaxed_trigger import THRESHOLDS, Threshold, needed_tasks, relaxed_trigger
from recipes.study import runner
from recipes.study.statistics import Change

SMALL = "num_train=256,width=4,look_every=1,evaluations=1"


@pytest.fixture(autouse=True)
def unchanged_style() -> Iterator[None]:
    """Drawing must not change the style of other figures."""
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


def look(left: float, right: float, cosine: float) -> Look:
    return Look(0, {"left": left, "right": right}, conflict=cosine < 0, majority=cosine < 0, weak=False, cosine=cosine)


def report(before: float, after: float, accepted: bool = True) -> TeleportReport:
    return TeleportReport(
        step=1,
        epoch=0,
        accepted=accepted,
        reason="",
        losses_before={"left": 1.0, "right": 3.0},
        losses_after={"left": 1.0, "right": 3.0},
        cosines_before={"left": before, "right": 0.9},
        cosines_after={"left": after, "right": 0.8},
        grad_norm_before=1.0,
        grad_norm_after=1.0,
        sigma=0.0,
        drift=0.0,
        seconds=0.0,
        forwards=0,
        backwards=0,
    )


class TestLevels:
    def test_a_conflict_is_matched_by_a_point_without_at_the_same_loss(self) -> None:
        conflicts = [look(1.0, 3.0, -0.1), look(5.0, 5.0, -0.1)]
        same, other_tasks = look(1.0, 3.0, 0.1), look(3.0, 1.0, 0.1)
        assert Levels([*conflicts, same]).matched(each_task=True) == 0.5
        # The same mean of other losses is not the same level of each.
        levels = Levels([*conflicts, other_tasks])
        assert (levels.matched(each_task=False), levels.matched(each_task=True)) == (0.5, 0.0)

    @pytest.mark.parametrize(("factor", "matched"), [(1 + 0.9 * TOLERANCE, 1.0), (1 + 1.1 * TOLERANCE, 0.0)])
    def test_the_same_is_up_to_the_tolerance(self, factor: float, matched: float) -> None:
        for losses in ((factor, 3.0 * factor), (1 / factor, 3.0 / factor)):
            assert Levels([look(1.0, 3.0, -0.1), look(*losses, 0.1)]).matched(each_task=True) == matched

    def test_points_of_one_kind_only(self) -> None:
        assert Levels([look(1.0, 3.0, -0.1)]).matched(each_task=False) == 0.0
        assert isnan(Levels([look(1.0, 3.0, 0.1)]).matched(each_task=False))

    def test_the_figure_shows_all_points_and_the_accepted_teleports(self) -> None:
        levels = Levels(
            [look(1.0, 3.0, -0.1), look(2.0, 2.0, 0.4)], [report(-0.5, 0.2), report(-0.4, 0.1, accepted=False)]
        )
        figure = loss_levels({"LS": levels})
        figure.canvas.draw()
        (ax,) = figure.axes
        points, jump = ax.get_lines()
        assert (list(points.get_xdata()), list(points.get_ydata())) == ([2.0, 2.0], [-0.1, 0.4])
        assert (list(jump.get_xdata()), list(jump.get_ydata())) == ([2.0, 2.0], [-0.5, 0.2])
        assert (ax.get_title(), ax.get_xscale(), ax.get_ylim()) == ("LS", "log", (-1, 1))


class TestThresholds:
    def test_they_ask_for_as_many_tasks_as_the_triggers_do(self) -> None:
        for name, needed in needed_tasks("digits:many").items():
            trigger = Majority(THRESHOLDS[name]) if THRESHOLDS[name] else any_conflict
            for conflicts in range(7):
                rows = [[1000.0]] + [[-1.0]] * conflicts + [[1.0]] * (6 - conflicts)
                gradients = TaskGradients([str(index) for index in range(7)], torch.tensor(rows))
                assert trigger(gradients) == (conflicts >= needed), (name, conflicts)

    def test_too_few_tasks_are_an_error(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        arguments = ["relaxed-trigger", "--problems", "digits:narrow", "--output", str(tmp_path)]
        assert main(arguments) == 1
        assert "'digits:narrow' has 2 tasks, too few" in capsys.readouterr().out

    def test_the_figure_is_relaxed_from_left_to_right(self) -> None:
        def change(mean: float) -> Change:
            return Change(mean, 1.0, mean - 2, mean + 2, 3, 5)

        points = [
            Threshold(0.5, change(-1.0), change(3.0), [1.2, 1.4], 10),
            Threshold(0.25, change(-4.0), change(9.0), [2.0, 3.0], 40),
        ]
        figure = relaxed_trigger({"FairGrad": points})
        figure.canvas.draw()
        left, right = figure.axes
        means = {line.get_label(): list(line.get_ydata()) for line in left.get_lines()[:2]}
        assert means == {"equal steps": [-1.0, -4.0], "equal time": [3.0, 9.0]}
        ends = sorted(segment[:, 1].tolist() for lines in left.collections for segment in lines.get_segments())
        assert ends == [[-6.0, -2.0], [-3.0, 1.0], [1.0, 5.0], [7.0, 11.0]]
        assert list(right.get_lines()[0].get_ydata()) == pytest.approx([1.3, 2.5])
        assert all(ax.get_xlim()[0] > ax.get_xlim()[1] for ax in (left, right))

    def test_one_seed_has_no_interval(self) -> None:
        alone = Change(1.0, nan, nan, nan, 0, 1)
        relaxed_trigger({"LS": [Threshold(0.5, alone, alone, [1.5], 3)]}).canvas.draw()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stored_looks(folder: Path, part: str) -> list[list[dict[str, float]]]:
    paths = sorted(path for path in (folder / "runs").glob("*.json") if part in path.name)
    return [json.loads(path.read_text(encoding="utf-8"))["measured"]["looks"] for path in paths]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes, which have tests of their own, would import everything anew."""

    def run(function: Any, specs: Mapping[str, Any], *others: object) -> Iterator[tuple[str, Any]]:
        for name, spec in specs.items():
            yield name, function(spec)

    monkeypatch.setattr(runner, "run_with_progress", run)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_conflict_ratio_counts_the_steps_of_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = f"digits:many,{SMALL}"
    arguments = ["conflict-ratio", "--problems", problem, "--seeds", "2", "--epochs", "5", "--jobs", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(str(tmp_path / f"conflict_ratio.{ending}") in printed for ending in ("md", "csv", "png"))
    rows = rows_of(tmp_path / "conflict_ratio.csv")
    for seed, looks in enumerate(stored_looks(tmp_path, "LS__plain")):
        assert len(looks) == 20
        flags = {
            "smallest gradient (Eq. 3)": [step["conflict"] for step in looks],
            "half of the tasks (Eq. 4)": [step["majority"] for step in looks],
            "any task with the mean": [step["cosine"] < 0 for step in looks],
            "any two tasks (weak)": [step["weak"] for step in looks],
        }
        for label, flag in flags.items():
            spans = [row for row in rows if (row["definition"], row["seed"]) == (label, str(seed))]
            # Four spans of five steps.
            assert [float(span["share"]) for span in spans] == [sum(flag[i : i + 5]) / 5 for i in range(0, 20, 5)]
        smallest, half, some, weak = flags.values()
        # Eq. 3 or Eq. 4 is a conflict of some task with the mean, and such a task conflicts with another one.
        assert all(a <= c and b <= c <= d for a, b, c, d in zip(smallest, half, some, weak, strict=True))
        assert any(some)
    # Finished runs are not run again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_loss_levels_of_a_method(tmp_path: Path) -> None:
    arguments = ["--problems", f"digits:narrow,{SMALL}", "--methods", "LS", "MGDA", "--epochs", "5", "--seeds", "1"]
    assert main(["loss-levels", *arguments, "--jobs", "1", "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "loss_levels.csv")
    assert [row["method"] for row in rows] == ["LS"] * 20 + ["MGDA"] * 20
    (looks,) = stored_looks(tmp_path, "LS__plain")
    assert [float(row["cosine"]) for row in rows[:20]] == [step["cosine"] for step in looks]
    table = (tmp_path / "loss_levels.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| LS", "| MGDA"]
    assert (tmp_path / "loss_levels.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_relaxed_trigger(tmp_path: Path) -> None:
    arguments = ["--problems", f"digits:many,{SMALL}", "--methods", "LS", "--epochs", "2", "--seeds", "1"]
    assert main(["relaxed-trigger", *arguments, "--jobs", "1", "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "relaxed_trigger.csv")
    assert [float(row["share"]) for row in rows] == pytest.approx([4 / 7, 3 / 7, 2 / 7, 1 / 7])
    assert all(float(row["slowdown_0"]) > 0 for row in rows)
    assert int(rows[0]["tried"]) <= int(rows[-1]["tried"])
    assert (tmp_path / "relaxed_trigger.png").stat().st_size > 0
