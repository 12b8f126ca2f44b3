"""The demo, run for real but small: what it writes must fit together."""

import contextlib
import csv
import io
import json
import math
import re

import pytest

from recipes.digits import demo
from recipes.digits._runs import METHODS, PROBLEMS, plan, plan_traces

DIRECTIONS = {"left_accuracy": 1, "right_accuracy": 1, "ink_mse": -1}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "not_there_yet"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert demo.main(["--quick", "--output", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def results(output):
    return read(output[0] / "results.csv")


@pytest.fixture(scope="module")
def summary(output):
    return read(output[0] / "summary.csv")


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def select(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def multi_task(rows):
    return [row for row in rows if row["method"] != "single-task"]


def metrics_of(row):
    return {name: float(row[name]) for name in DIRECTIONS if row[name]}


def test_every_method_ran_without_and_with_cost(results, summary):
    wanted = {(problem, method, cost) for problem in PROBLEMS for method in METHODS for cost in "01"}
    for rows in (results, summary):
        found = [(row["problem"], row["method"], row["cost"]) for row in multi_task(rows)]
        assert len(found) == len(set(found))
        assert set(found) == wanted
    assert len({row["steps"] for row in results}) == 1


def test_every_task_has_a_single_task_run(results):
    found = {(row["problem"], row["task"]) for row in results if row["method"] == "single-task"}
    assert found == {(name, task) for name, problem in PROBLEMS.items() for task in problem.tasks}


def test_runs_of_a_pair_set_out_from_the_same_weights_on_the_same_batch(results):
    for problem in PROBLEMS:
        losses = [row["first_step_loss"] for row in multi_task(select(results, problem=problem))]
        assert len(losses) == 2 * len(METHODS)
        assert len(set(losses)) == 1


def test_runs_of_a_pair_are_the_same_until_cost_begins(output):
    rows = read(output[0] / "validation.csv")
    for problem in PROBLEMS:
        for method in METHODS:
            plain, cost = (
                [metrics_of(row) for row in select(rows, problem=problem, method=method, cost=flag)] for flag in "01"
            )
            assert len(plain) == len(cost) == 2
            assert plain[0] == cost[0]


def test_teleports_changed_the_runs(results):
    for problem in PROBLEMS:
        for method in METHODS:
            (plain,), (cost,) = (select(results, problem=problem, method=method, cost=flag) for flag in "01")
            assert plain["teleports_tried"] == "0"
            accepted, tried = int(cost["teleports_accepted"]), int(cost["teleports_tried"])
            assert 0 <= accepted <= tried <= 20
            assert accepted == 0 or metrics_of(plain) != metrics_of(cost)
    assert sum(int(row["teleports_accepted"]) for row in results) > 0


def test_delta_m_follows_from_the_metrics(results, summary):
    for problem in PROBLEMS:
        baselines = {}
        for row in select(results, problem=problem, method="single-task"):
            baselines |= metrics_of(row)
        for row in multi_task(select(results, problem=problem)):
            parts = [
                DIRECTIONS[name] * (baselines[name] - value) / baselines[name]
                for name, value in metrics_of(row).items()
            ]
            assert float(row["delta_m"]) == pytest.approx(100 * sum(parts) / len(parts), rel=1e-5)
            (line,) = select(summary, problem=problem, method=row["method"], cost=row["cost"])
            assert float(line["delta_m"]) == pytest.approx(float(row["delta_m"]))


def test_the_change_by_cost_is_the_difference_of_the_rows(summary):
    for problem in PROBLEMS:
        for method in METHODS:
            (plain,), (cost,) = (select(summary, problem=problem, method=method, cost=flag) for flag in "01")
            assert plain["change_by_cost"] == ""
            difference = float(cost["delta_m"]) - float(plain["delta_m"])
            assert float(cost["change_by_cost"]) == pytest.approx(difference, abs=1e-4)
            assert cost["change_by_cost_se"] == ""  # of one seed there is none


def test_the_mean_ranks_share_out_all_ranks(summary):
    for problem in PROBLEMS:
        ranks = [float(row["mean_rank"]) for row in multi_task(select(summary, problem=problem))]
        assert sum(ranks) == pytest.approx(21)


def test_the_conflict_share_is_that_of_the_run(results, summary):
    for row in multi_task(results):
        (line,) = select(summary, problem=row["problem"], method=row["method"], cost=row["cost"])
        share = int(row["conflicting"]) / int(row["steps_looked_at"])
        assert int(row["steps_looked_at"]) == math.ceil(int(row["steps"]) / 10)
        assert float(line["conflict_share"]) == pytest.approx(share)


def test_teleports_csv_holds_the_teleports_of_its_run(output, results):
    rows = read(output[0] / "teleports.csv")
    (run,) = select(results, problem="narrow", method="LS", cost="1")
    assert len(rows) == int(run["teleports_tried"])
    assert sum(row["accepted"] == "True" for row in rows) == int(run["teleports_accepted"])
    assert all(float(row["cosines_before_right"]) < 0 for row in rows)


def test_the_traced_teleports_set_out_from_one_point(output):
    traced = json.loads((output[0] / "teleport_trace.json").read_text(encoding="utf-8"))
    assert set(traced) == {"default", "paper", "penalty"}
    starts = [(report["step"], report["losses_before"], report["cosines_before"]) for (report,) in traced.values()]
    assert starts[0] == starts[1] == starts[2]
    assert {row["stage"] for row in traced["paper"][0]["trace"]} >= {"search"}


def test_figures_are_written_and_named(output):
    folder, printed = output
    for name in ("teleport_trace", "before_after", "conflict_vs_loss", "curves"):
        path = folder / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in printed


def test_the_tables_show_every_method(output):
    _, printed = output
    for method in METHODS:
        assert len(re.findall(rf"^ {method} +\d", printed, re.MULTILINE)) == len(PROBLEMS)
    assert len(re.findall(r"^ +\+ COST +\d", printed, re.MULTILINE)) == len(PROBLEMS) * len(METHODS)
    assert "…" not in printed  # Nothing was cut.
    assert "prototype saw a gain" in " ".join(printed.split())
    assert "Traceback" not in printed


def test_names_of_runs_are_unique():
    specs = plan([0, 1, 2]) + plan_traces(0)
    assert len({spec.name for spec in specs}) == len(specs) == 2 + 3 * (2 + 3 + 12)


def test_a_failing_run_fails_the_demo_loudly(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "train", math.sqrt)
    assert demo.main(["--quick", "--jobs", "1", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "The run 'narrow: LS + COST, seed 0' failed" in printed
    assert "TypeError: must be real number, not RunSpec" in printed
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_a_status_and_not_a_traceback(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(demo, "run_with_progress", interrupted)
    assert demo.main(["--output", str(tmp_path)]) == 130
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be at least 1; got 0"),
        (["--jobs", "0"], "argument --jobs: must be at least 1; got 0"),
        (["--seeds", "1", "1"], "each seed once"),
        (["--seeds", "-1"], "argument --seeds"),
        (["--epochs", "many"], "invalid integer value: 'many'"),
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
