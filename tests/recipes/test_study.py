"""Studies: plans, callbacks, and the command line killed and started again."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import lightning as L
import pytest
from torch.utils.data import DataLoader

from lightning_cost import SymmetryTeleportCallback
from lightning_cost.triggers import Majority, any_conflict, dominated_conflict, weak_conflict
from recipes.common.compare import SINGLE_TASK, Variant
from recipes.common.training import train_and_test
from recipes.methods import METHODS, make_method
from recipes.study import Problem, Row, Study
from recipes.study.__main__ import main
from recipes.study.callbacks import CALLBACKS, make_callback
from recipes.study.experimental import SmoothedTrigger
from recipes.study.presets import PRESETS
from recipes.study.problem import baseline_problem, find_problem
from recipes.study.runner import settings_of
from recipes.study.spec import RunSpec, plan
from recipes.study.store import StoredRunError, versions
from tests.support.nets import Net, make_batches

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------------------------------------------------- names


def test_overrides_of_a_problem():
    problem = find_problem("digits:narrow,width=8,loss_weights.right=0.5,lr_milestones=[3, 5]")
    assert (problem.width, problem.loss_weights, problem.lr_milestones) == (8, {"left": 1.0, "right": 0.5}, [3, 5])
    tiny = find_problem("digits:narrow,loss_weights.right=1e-3,loss_weights.left=2")
    assert tiny.loss_weights == {"left": 2.0, "right": 1e-3}
    whole = find_problem("digits:narrow,loss_weights={left: 1, right: 0.5},width=3")
    assert (whole.loss_weights, whole.width) == ({"left": 1, "right": 0.5}, 3)
    assert find_problem("digits:narrow").loss_weights == {"left": 1.0, "right": 0.03}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits:nothing", "digits:balanced.*got 'digits:nothing'"),
        ("no_such_recipe:narrow", "there is none of them"),
        ("digits:narrow,width=wide", "number like 16"),
        ("digits:narrow,width.x=3", "no entries"),
        ("digits:narrow,depth=3", "field of .*width.*got 'depth=3'"),
        ("digits:narrow,width", "field=value"),
    ],
)
def test_unknown_problems(name, message):
    with pytest.raises(ValueError, match=message):
        find_problem(name)


MINE = replace(find_problem("digits:narrow"), title="mine")


def test_a_problem_of_ones_own_module():
    assert find_problem(f"{__name__}:MINE,width=3") == replace(MINE, width=3)


def test_baselines_are_shared_where_the_problem_is_the_same_for_a_single_task():
    assert baseline_problem("digits:narrow,loss_weights.right=0.1,width=8") == "digits:narrow,width=8"
    rows = [Row(f"digits:narrow,loss_weights.right={weight}", Variant("LS")) for weight in (1, 0.1)]
    specs = plan(rows, seeds=[3, 4], epochs=5)
    singles = [(spec.problem, spec.task, spec.seed) for spec in specs if spec.variant.method == SINGLE_TASK]
    assert singles == [("digits:narrow", task, seed) for seed in (3, 4) for task in ("left", "right")]
    assert len({spec.name for spec in specs}) == len(specs) == 8


def test_seeds_of_a_plan():
    rows = [Row("digits:narrow", Variant("LS"))]
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match="each once"):
            plan(rows, seeds)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_compare_with_the_method_without_a_callback(name):
    preset = PRESETS[name]
    rows = preset.rows(f"digits:{preset.problem}")
    assert len(rows) == len(set(rows)) > 1
    for row in rows:
        assert replace(row, variant=row.variant.plain) in rows
        settings_of(RunSpec(row.problem, row.variant, seed=0, epochs=16))  # all names are known


def test_every_method_of_the_paper_has_both_rows():
    rows = PRESETS["plug-and-play"].rows("digits:narrow")
    assert [(row.variant.method, row.variant.callback) for row in rows] == [
        (method, callback) for method in METHODS for callback in ("", "COST")
    ]
    assert len(METHODS) == 15


def test_callbacks():
    problem = find_problem("digits:narrow")
    for name in CALLBACKS:
        if name != "after drops":
            one, other = make_callback(name, problem, 1), make_callback(name, problem, 2)
            assert repr(one) == repr(other).replace("seed=2", "seed=1")
            assert ("seed=1" in repr(one)) == isinstance(one, SymmetryTeleportCallback)
    assert make_callback(f"{__name__}:tiny_steps", problem, 0).schedule.check_every_n_steps == 7
    with pytest.raises(ValueError, match="must be a Callback"):
        make_callback(f"{__name__}:no_callback", problem, 0)
    with pytest.raises(ValueError, match=r"COST.*got 'cost'"):
        make_callback("cost", problem, 0)
    for impossible in (problem, replace(problem, epochs=4, lr_milestones=[4])):
        with pytest.raises(ValueError, match="no epoch to teleport in"):
            make_callback("after drops", impossible, 0)
    with pytest.raises(ValueError, match="no epoch to teleport in"):
        make_callback("first third", replace(problem, epochs=2), 0)
    settings = settings_of(RunSpec("digits:narrow", Variant("LS", "last third"), seed=0, epochs=6))
    assert settings["callback"].endswith("in epochs [4, 5]")
    assert make_callback("after drops", replace(problem, lr_milestones=[4]), 0).epochs == {4, 5}


_OTHERS = ("after drops", "features", "weights every 2", "weights every 10")
TELEPORTS = [name for name in CALLBACKS if name not in _OTHERS]


def no_callback(problem, seed):
    return problem


def tiny_steps(problem, seed):
    return SymmetryTeleportCallback(check_every_n_steps=7)


def test_triggers_by_name():
    problem = find_problem("digits:many")
    triggers = {name: make_callback(name, problem, 0).trigger for name in TELEPORTS}
    assert triggers["any"] is any_conflict
    assert triggers["weak"] is weak_conflict
    assert [triggers[f"majority {share}"] for share in (0.5, 0.3, 0.15)] == [Majority(s) for s in (0.5, 0.3, 0.15)]
    assert isinstance(triggers["running mean"], SmoothedTrigger)
    assert triggers["COST"] is dominated_conflict


SMALL = "digits:narrow,num_train=16,batch_size=8,evaluations=1"


# Those of the sweep differ in numbers only.
@pytest.mark.parametrize("name", [name for name in TELEPORTS if not name.startswith("paper's,")])
def test_every_callback_trains(name):
    problem = find_problem(SMALL)
    callback = make_callback(name, replace(problem, epochs=5), 0)
    callback.trigger = lambda gradients: True
    if callback.schedule.check_every_n_steps > 9:
        # There are ten steps.
        callback.schedule = replace(callback.schedule, check_every_n_steps=9)
    measured = train_and_test(
        lambda: problem.make_model(problem.tasks, None),
        problem.make_data(problem.tasks, 0),
        seed=0,
        epochs=5,
        compared=callback,
        validate_every=5,
        look_every=None,
    )
    assert measured.reports
    assert all(math.isfinite(value) for value in measured.test.values())


@pytest.mark.parametrize(("name", "options"), [("features", ("features", 1)), ("weights every 10", ("parameters", 10))])
def test_options_of_the_mixin_reach_it_before_its_setup(name, options):
    problem = replace(find_problem(SMALL), epochs=2)
    seen = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((pl_module.task_gradients_of, pl_module.weights_every))

    def train(name):
        return train_and_test(
            lambda: problem.make_model(problem.tasks, make_method("UPGrad", 2)),
            problem.make_data(problem.tasks, 0),
            seed=0,
            epochs=2,
            compared=make_callback(name, problem, 0),
            callbacks=[Look()],
        )

    assert train(name).reports == []
    assert seen == [options]


def test_settings_are_the_same_in_another_process():
    program = (
        "from recipes.study.presets import PRESETS\nfrom recipes.study.runner import settings_of\n"
        "from recipes.study.spec import plan\n"
        "for name, preset in PRESETS.items():\n"
        "    for spec in plan(preset.rows(f'digits:{preset.problem}'), [0]): print(spec.name, settings_of(spec))"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                       capture_output=True, text=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1
    assert "GradDrop" in outputs.pop()


def test_settings_with_an_address_are_refused():
    with pytest.raises(ValueError, match=r"callback of the run .*no_repr.* without a `__repr__`"):
        settings_of(RunSpec("digits:narrow", Variant("LS", f"{__name__}:no_repr"), seed=0, epochs=2))


def no_repr(problem, seed):
    class Trigger:
        def __call__(self, gradients):
            return True

    return SymmetryTeleportCallback(trigger=Trigger())


# --------------------------------------------------------------------------------------------------------- command line

COMMAND = ["digits", "--seeds", "2", "--epochs", "2"]
SET = ["--set", "num_train=256", "evaluations=2", "look_every=3"]
NUM_RUNS = 2 * 2 + 2 * 2


def test_a_study_killed_and_started_again_repeats_and_loses_nothing(tmp_path, capsys):
    output = tmp_path / "study"
    command = [*COMMAND, *SET, "--jobs", "1", "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.study", *command], stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(finished(output)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(output)
    assert 2 <= len(before) < NUM_RUNS

    assert main(command) == 0
    after = finished(output)
    assert len(after) == NUM_RUNS
    assert {name: after[name] for name in before} == before
    assert f"{NUM_RUNS} runs, {NUM_RUNS - len(before)} of them done now." in capsys.readouterr().out

    # Again, for the table of the test split: there is nothing left to run.
    assert main([*command, "--split", "test"]) == 0
    assert "Test metrics" in next(output.glob("*_test.md")).read_text()
    assert finished(output) == after
    assert f"{NUM_RUNS} runs, 0 of them done now." in capsys.readouterr().out

    table = next(output.glob("digits_narrow_*grid_validation.md")).read_text()
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| LS")]
    assert [[cell.strip() for cell in row] for row in rows] == [["LS", "–"], ["LS", "COST"]]
    with next(output.glob("*validation_summary.csv")).open(newline="") as file:
        summary = list(csv.DictReader(file))
    assert [row["equal_steps_seeds"] for row in summary] == ["", "2"]
    with next(output.glob("*validation_curves.csv")).open(newline="") as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == 2 * 2 * 2
    ends = [row for row in curves if row["step"] == "8" and not row["callback"]]
    last = [float(row["delta_m"]) for row in ends]
    assert float(summary[0]["delta_m"]) == pytest.approx(sum(last) / 2)
    drawn = {path.stem.split("_")[-1] for path in output.glob("*.png")}
    assert {"steps", "time", "changes", "conflict"} <= drawn

    # Runs of a pair start alike, and stay so until the first teleport may come.
    stored = [json.loads(path.read_text()) for path in sorted((output / "runs").glob("*__s0.json"))]
    looks = [run["measured"]["looks"] for run in stored if run["measured"]["looks"]]
    first_epoch = [[look["losses"] for look in of_run if look["step"] <= 4] for of_run in looks]
    assert len(first_epoch) == 2
    assert len(first_epoch[0]) == 2
    assert first_epoch[0] == first_epoch[1]
    assert all(run["versions"] == versions() for run in stored)


def finished(output):
    return {path.name: path.stat().st_mtime_ns for path in (output / "runs").glob("*.json")}


def broken(problem, seed):
    return SymmetryTeleportCallback(trigger=lambda gradients: 1 / 0)


def test_a_run_that_fails_ends_the_study_with_its_traceback(tmp_path, capsys):
    rows = ["digits", "--methods", "LS", "--callbacks", f"{__name__}:broken", "--seeds", "1", "--epochs", "2"]
    assert main([*rows, *SET, "--jobs", "1", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in printed
    assert "broken" in printed


def test_rows_that_the_preset_does_not_have(tmp_path, capsys):
    for option, wrong in (("--callbacks", "cost"), ("--methods", "CAGrad")):
        assert main(["digits", "--preset", "control", option, wrong, "--output", str(tmp_path)]) == 1
        assert f"`{option}` must be of the preset's" in capsys.readouterr().out


def test_metrics_that_the_model_does_not_log(tmp_path, capsys):
    arguments = [__name__, "--problem", "WRONG", "--callbacks", f"{__name__}:often", "--seeds", "1", "--jobs", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    assert "names ['left_accuracy'], which the model does not log" in " ".join(capsys.readouterr().out.split())


def test_bad_arguments(tmp_path, capsys):
    assert main(["digits", "--problem", "nothing", "--output", str(tmp_path)]) == 1
    assert "digits:narrow" in capsys.readouterr().out
    for arguments in (["digits", "--seeds", "0"], ["digits", "--preset", "nothing"], ["digits", "--methods", "SGD"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert not list(tmp_path.iterdir())


class MeasuredNet(Net):
    """Logs what a study compares."""

    def _measure(self, stage, batch):
        self.log_dict({f"{stage}/{name}_mse": loss for name, loss in self.task_losses(batch, 0).items()}, batch_size=1)

    def validation_step(self, batch, batch_idx):
        self._measure("val", batch)

    def test_step(self, batch, batch_idx):
        self._measure("test", batch)


class Batches(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(make_batches(6), batch_size=None)

    def val_dataloader(self):
        return DataLoader(make_batches(2, seed=1), batch_size=None)

    test_dataloader = val_dataloader


class NetProblem(Problem):
    """A module that has nothing to do with any recipe."""

    @property
    def higher_is_better(self):
        return {f"{task}_mse": False for task in self.tasks}

    def make_model(self, tasks, method):
        return MeasuredNet(method, tasks=tasks)

    def make_data(self, tasks, seed):
        return Batches()

    def make_callbacks(self, folder):
        return [TestedWeights(folder)]


class TestedWeights(L.Callback):
    """Writes what is tested; the last to be tested are the weights of the last step."""

    __test__ = False

    def __init__(self, folder):
        self.folder = folder

    def on_test_end(self, trainer, pl_module):
        self.folder.mkdir(parents=True, exist_ok=True)
        mean = float(sum(parameter.sum() for parameter in pl_module.parameters()))
        (self.folder / "weights.txt").write_text(f"{trainer.global_step} {mean}")


class WrongProblem(NetProblem):
    @property
    def higher_is_better(self):
        return {"left_accuracy": True, "right_mse": False}


WRONG = WrongProblem(title="wrong", tasks=("left", "right"), epochs=1)
OURS = NetProblem(title="ours", tasks=("left", "right"), epochs=2)


def test_a_study_of_ones_own_module(tmp_path, capsys):
    command = [__name__, "--problem", "OURS", "--methods", "FAMO", "--callbacks", f"{__name__}:often", "--seeds", "1"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    (table,) = tmp_path.glob("*.md")
    assert "ours" in table.read_text()
    with next(tmp_path.glob("*summary.csv")).open(newline="") as file:
        plain, often = csv.DictReader(file)
    assert (plain["callback"], often["callback"]) == ("", f"{__name__}:often")
    assert int(often["teleports_tried"]) == 6
    assert float(plain["left_mse"]) > 0
    # The single-task runs have no callbacks, and the two others folders of their own.
    steps, weights = zip(*(path.read_text().split() for path in tmp_path.glob("runs/*/weights.txt")), strict=True)
    assert steps == ("12", "12")
    assert len(set(weights)) == 2


def often(problem, seed):
    return SymmetryTeleportCallback(trigger=lambda gradients: True)


def test_a_study_in_python(tmp_path):
    rows = [Row(SMALL, Variant("LS")), Row(SMALL, Variant("LS", "COST"))]
    study = Study(rows, output=tmp_path, seeds=[5], epochs=1, title="Mine")
    with pytest.raises(StoredRunError, match="not finished"):
        study.results()
    assert study.run(jobs=1) == 4
    assert study.run(jobs=1) == 0
    text = study.results().markdown()
    assert "## Mine" in text
    assert "2 steps" in text
    assert [row.variant for row in study.results().summaries[SMALL]] == [Variant("LS"), Variant("LS", "COST")]
