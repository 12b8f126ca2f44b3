"""The demo, run for real but small: what it writes must fit together."""

import contextlib
import csv
import io
import math
import re

import pytest

from recipes.common.compare import Variant
from recipes.digits import demo
from recipes.study import Study
from recipes.study.presets import Preset
from recipes.study.problem import find_problem

pytestmark = pytest.mark.slow

METHODS = ("LS", "FairGrad", "UPGrad")
DIRECTIONS = {"left_accuracy": 1, "right_accuracy": 1, "ink_mse": -1}
PROBLEMS = {name: find_problem(name) for name in demo.DEMO.problems.values()}
NARROW = next(iter(PROBLEMS))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "not_there_yet"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert demo.main(["--quick", "--output", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def results(output):
    return read(output[0] / "demo_test_runs.csv")


@pytest.fixture(scope="module")
def summary(output):
    return read(output[0] / "demo_test_summary.csv")


@pytest.fixture(scope="module")
def measured(output):
    """Problem and variant to what the run recorded; single-task runs are left out."""
    rows = [row for problem in PROBLEMS for row in Preset("", METHODS, ["COST"]).rows(problem)]
    study = Study(rows, output[0], seeds=[0])
    return {(s.problem, s.variant): study.store.load(s).measured for s in study.specs if s.task is None}


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def select(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def multi_task(rows):
    return [row for row in rows if row["method"] != "single-task"]


def pair(rows, problem, method):
    (plain,), (cost,) = (select(rows, problem=problem, method=method, callback=name) for name in ("", "COST"))
    return plain, cost


def metrics_of(row):
    return {name: float(row[name]) for name in DIRECTIONS if row[name]}


def test_the_methods_and_problems_of_the_demo():
    assert demo.DEMO.methods == METHODS
    assert [(problem.title, problem.epochs) for problem in map(find_problem, demo.DEMO.problems)] == [
        ("narrow, imbalanced", 10),
        ("balanced", 4),
    ]


def test_every_method_ran_without_and_with_cost(results, summary):
    wanted = {(problem, method, callback) for problem in PROBLEMS for method in METHODS for callback in ("", "COST")}
    for rows in (results, summary):
        found = [(row["problem"], row["method"], row["callback"]) for row in multi_task(rows)]
        assert len(found) == len(set(found))
        assert set(found) == wanted
    assert {row["steps"] for row in results} == {"40"}


def test_every_task_has_a_single_task_run(results):
    singles = select(results, method="single-task")
    found = {(find_problem(row["problem"]).title, row["task"]) for row in singles}
    assert found == {(problem.title, task) for problem in PROBLEMS.values() for task in problem.tasks}
    assert len(singles) == len(found)


def test_runs_of_a_pair_set_out_from_the_same_weights_on_the_same_batch(measured):
    for problem in PROBLEMS:
        for method in METHODS:
            plain, cost = (measured[problem, Variant(method, callback)].looks[0] for callback in ("", "COST"))
            # COST begins with the second epoch, after ten steps.
            assert plain.step == cost.step < 10
            assert plain.losses == cost.losses


def test_runs_of_a_pair_are_the_same_until_cost_begins(measured):
    for problem in PROBLEMS:
        for method in METHODS:
            plain, cost = (measured[problem, Variant(method, callback)] for callback in ("", "COST"))
            assert len(plain.validation) == len(cost.validation) == 2
            assert plain.validation[0] == cost.validation[0]


def test_teleports_changed_the_runs(results):
    for problem in PROBLEMS:
        for method in METHODS:
            plain, cost = pair(results, problem, method)
            assert plain["teleports_tried"] == "0"
            accepted, tried = int(cost["teleports_accepted"]), int(cost["teleports_tried"])
            assert 0 <= accepted <= tried <= 20
            assert accepted == 0 or metrics_of(plain) != metrics_of(cost)
    assert sum(int(row["teleports_accepted"]) for row in results) > 0


def test_delta_m_follows_from_the_metrics(results, summary):
    for name, problem in PROBLEMS.items():
        baselines = {}
        for row in select(results, method="single-task"):
            if find_problem(row["problem"]).title == problem.title:
                baselines |= metrics_of(row)
        for row in multi_task(select(results, problem=name)):
            parts = [
                DIRECTIONS[metric] * (baselines[metric] - value) / baselines[metric]
                for metric, value in metrics_of(row).items()
            ]
            (line,) = select(summary, problem=name, method=row["method"], callback=row["callback"])
            assert float(line["delta_m"]) == pytest.approx(100 * sum(parts) / len(parts), rel=1e-5)
            assert metrics_of(line) == pytest.approx(metrics_of(row))


def test_the_change_by_cost_is_the_difference_of_the_rows(summary):
    for problem in PROBLEMS:
        for method in METHODS:
            plain, cost = pair(summary, problem, method)
            assert plain["equal_steps_mean"] == ""
            difference = float(cost["delta_m"]) - float(plain["delta_m"])
            assert float(cost["equal_steps_mean"]) == pytest.approx(difference, abs=1e-4)
            assert cost["equal_steps_error"] == "nan"  # of one seed there is none


def test_the_mean_ranks_share_out_all_ranks(summary):
    for problem in PROBLEMS:
        ranks = [float(row["mean_rank"]) for row in select(summary, problem=problem)]
        assert sum(ranks) == pytest.approx(21)


def test_the_conflict_share_is_that_of_the_run(measured, summary):
    for (problem, variant), run in measured.items():
        (line,) = select(summary, problem=problem, method=variant.method, callback=variant.callback)
        assert len(run.looks) == math.ceil(run.steps / 10)
        assert float(line["conflict_share"]) == pytest.approx(sum(look.conflict for look in run.looks) / len(run.looks))


def test_the_stored_teleports_are_those_of_the_table(measured, results):
    for (problem, variant), run in measured.items():
        (row,) = select(results, problem=problem, method=variant.method, callback=variant.callback)
        assert len(run.reports) == int(row["teleports_tried"])
        assert sum(report.accepted for report in run.reports) == int(row["teleports_accepted"])
    assert all(report.cosines_before["right"] < 0 for report in measured[NARROW, Variant("LS", "COST")].reports)


def test_the_traced_teleports_set_out_from_one_point(output, measured):
    first = [measured[NARROW, Variant("LS", "COST")].reports[0]]
    rows = Preset("", ["LS"], ["paper", "penalty search"]).rows(NARROW)
    study = Study(rows, output[0], seeds=[0], epochs=2)
    first += [study.store.load(spec).measured.reports[0] for spec in study.specs if spec.variant.callback]
    starts = [(report.step, report.losses_before, report.cosines_before) for report in first]
    assert starts[0] == starts[1] == starts[2]
    assert {row["stage"] for row in first[1].trace} >= {"search"}


def test_figures_are_written_and_named(output):
    folder, printed = output
    figures = {path.name for path in folder.glob("*.png")}
    assert {"demo_teleport_trace.png", "demo_conflict_vs_loss.png"} <= figures
    for kind in ("curves_steps", "curves_time", "changes", "conflict", "before_after"):
        assert len([name for name in figures if name.endswith(f"{kind}.png")]) == len(PROBLEMS)
    for name in figures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert str(folder / name) in printed


def test_the_tables_show_every_method(output):
    _, printed = output
    for method in METHODS:
        assert len(re.findall(rf"^ {method} +– +-?\d", printed, re.MULTILINE)) == len(PROBLEMS)
        assert len(re.findall(rf"^ {method} +COST +-?\d", printed, re.MULTILINE)) == len(PROBLEMS)
    assert len(re.findall(r"^ single-task +– +0 ", printed, re.MULTILINE)) == len(PROBLEMS)
    assert "…" not in printed  # Nothing was cut.
    assert "prototype saw a gain" in " ".join(printed.split())
    assert "One seed has no standard error" in printed
    assert "Traceback" not in printed


def test_the_same_command_again_trains_nothing(output, monkeypatch):
    monkeypatch.setattr("recipes.study.runner.run_with_progress", None)
    assert demo.main(["--quick", "--output", str(output[0])]) == 0


def test_the_caption_says_how_far_to_trust_some_seeds():
    assert "A 95% interval of a mean over 3 seeds is 4.3 standard errors wide" in demo.caption(3)


def test_a_failing_run_fails_the_demo_loudly(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("recipes.study.runner._train", math.sqrt)
    assert demo.main(["--quick", "--jobs", "1", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"The run 'digits_balanced_.*__LS__plain__e2__s0' failed", printed)
    assert "TypeError: must be real number, not tuple" in printed
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_a_status_and_not_a_traceback(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("recipes.study.runner.run_with_progress", interrupted)
    assert demo.main(["--output", str(tmp_path)]) == 130
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be at least 1; got 0"),
        (["--jobs", "0"], "argument --jobs: must be at least 1; got 0"),
        (["--seeds", "0"], "argument --seeds: must be at least 1; got 0"),
        (["--seeds", "-1"], "argument --seeds"),
        (["--epochs", "many"], "invalid integer value: 'many'"),
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
