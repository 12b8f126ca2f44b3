"""Studies: stored runs, and statistics worked by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_cost import TeleportReport
from recipes.common.compare import SINGLE_TASK, Estimate, Variant
from recipes.common.training import Evaluation, Look, Measured
from recipes.study import Problem
from recipes.study.problem import find_problem
from recipes.study.report import markdown_table
from recipes.study.runner import settings_of
from recipes.study.spec import RunSpec
from recipes.study.statistics import final_metrics, group, paired_change, summarize
from recipes.study.store import Record, Store, StoredRunError, versions

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------------------------------------------------- store


LS, COST = Variant("LS"), Variant("LS", "COST")


def make_record(variant=LS, seed=0, task=None, values=(0.5, 0.6), seconds=(1.0, 2.0)):
    """A run of two evaluations at steps 10 and 20, whose metrics are the values."""
    tasks = ["left", "right"] if task is None else [task]
    curve = [
        Evaluation(10 * (place + 1), {f"{name}_accuracy": value for name in tasks}, seconds[place])
        for place, value in enumerate(values)
    ]
    report = TeleportReport(
        step=3,
        epoch=1,
        accepted=True,
        reason="accepted",
        losses_before={"left": 1.0},
        losses_after={"left": 1.1},
        cosines_before={"left": -0.1},
        cosines_after={"left": 0.1},
        grad_norm_before=1.0,
        grad_norm_after=2.0,
        sigma=0.1,
        drift=0.01,
        seconds=0.5,
        forwards=4,
        backwards=5,
        trace=[{"stage": "start"}],
    )
    looks = [Look(0, {"left": 1.0}, True, False, True, -0.5), Look(10, {"left": 1.0}, False, False, False, 0.5)]
    reports = [report] if variant.callback else []
    measured = Measured(curve[-1].metrics, curve, looks, reports, 20, 2.5, 2.0, curve)
    spec = RunSpec("digits:narrow", variant, seed, epochs=2, task=task)
    return Record(spec, settings_of(spec), versions(), measured)


def test_a_stored_run_comes_back(tmp_path):
    record, store = make_record(COST), Store(tmp_path / "runs")
    assert not store.has(record.spec, record.settings)
    store.save(record)
    assert store.has(record.spec, record.settings)
    loaded = store.load(record.spec)
    assert loaded == record
    assert loaded.measured.validation[0].seconds == 1.0
    assert sorted(path.name for path in store.folder.iterdir()) == [
        f"{record.spec.name}.json",
        f"{record.spec.name}.reports.jsonl.gz",
    ]


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    store, record = Store(tmp_path), make_record()
    store.save(replace(record, settings={**record.settings, "method": "another"}))
    with pytest.raises(StoredRunError, match=r"method.*another.*Delete it"):
        store.has(record.spec, record.settings)


def test_a_broken_file_is_named(tmp_path):
    store, record = Store(tmp_path), make_record()
    with pytest.raises(StoredRunError, match="not finished"):
        store.load(record.spec)
    store.save(record)
    (tmp_path / f"{record.spec.name}.reports.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(StoredRunError, match=r"reports\.jsonl\.gz cannot be read"):
        store.load(record.spec)
    (tmp_path / f"{record.spec.name}.json").write_text("{")
    with pytest.raises(StoredRunError, match="Delete it to run it again"):
        store.has(record.spec, record.settings)


def test_a_run_that_fails_to_be_written_is_not_there(tmp_path, monkeypatch):
    store, record = Store(tmp_path), make_record()
    monkeypatch.setattr(Path, "write_text", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.save(record)
    assert not store.has(record.spec, record.settings)
    assert not list(tmp_path.glob(".*"))


# ----------------------------------------------------------------------------------------------------------- statistics


def test_changes_at_equal_steps_and_at_equal_time():
    records = [
        *(make_record(Variant(SINGLE_TASK), seed, task, (0.7, 0.8)) for seed in (0, 1) for task in ("left", "right")),
        make_record(LS, 0, values=(0.4, 0.6)),
        make_record(LS, 1, values=(0.4, 0.4)),
        # Twice as slow: after the 2 seconds of LS it is where its first evaluation was.
        make_record(COST, 0, values=(0.56, 0.8), seconds=(2.0, 4.0)),
        make_record(COST, 1, values=(0.4, 0.5), seconds=(2.0, 4.0)),
    ]
    plain, with_cost = summarize(find_problem("digits:narrow"), records, "validation")
    assert plain.delta_m.mean == pytest.approx((25 + 50) / 2)
    assert plain.same_steps is plain.same_time is plain.slowdown is None
    assert with_cost.delta_m.mean == pytest.approx((0 + 37.5) / 2)
    # At equal steps 0 - 25 and 37.5 - 50; at equal time 30 - 25 and 50 - 50.
    assert with_cost.same_steps.mean == pytest.approx((-25 - 12.5) / 2)
    assert with_cost.same_time.mean == pytest.approx((5 + 0) / 2)
    assert (with_cost.same_steps.better, with_cost.same_time.better) == (2, 0)
    assert with_cost.slowdown == pytest.approx(2.0)
    assert (plain.mean_rank, with_cost.mean_rank) == (2.0, 1.0)
    assert (plain.conflict, with_cost.accepted, with_cost.tried) == (0.5, 2, 2)


class ByHand(Problem):
    higher_is_better = {"accuracy": True, "mse": False}  # noqa: RUF012
    make_model = make_data = None


def make_run(method, seed, callback="", task=None, conflicts=(), **metrics):
    looks = [
        Look(step, {"a": 1.0, "b": 3.0}, conflict, False, conflict, 0.0) for step, conflict in enumerate(conflicts)
    ]
    curve = [Evaluation(10, metrics, 1.0)]
    measured = Measured(metrics, curve, looks, [], 10, 1.0, 1.0, curve)
    return Record(RunSpec("by hand", Variant(method, callback), seed, 1, task), {}, {}, measured)


# Baselines: accuracy 0.8, mse 2.0.
RUNS = [
    make_run(SINGLE_TASK, 0, task="a", accuracy=0.7),
    make_run(SINGLE_TASK, 1, task="a", accuracy=0.9),
    make_run(SINGLE_TASK, 0, task="b", mse=1.0),
    make_run(SINGLE_TASK, 1, task="b", mse=3.0),
    # 50% worse and 50% worse; 25% worse and 0: Δm 50 and 12.5.
    make_run("LS", 0, accuracy=0.4, mse=3.0, conflicts=(True, False)),
    make_run("LS", 1, accuracy=0.6, mse=2.0, conflicts=(True, True)),
    # In another order of the seeds: 0 and 10% better, -5; 25% worse and 25% worse, 25.
    make_run("LS", 1, callback="COST", accuracy=0.8, mse=1.8, conflicts=(False, False)),
    make_run("LS", 0, callback="COST", accuracy=0.6, mse=2.5, conflicts=(False, True)),
    # 12.5% better and 20% worse, 3.75, twice.
    make_run("UPGrad", 0, accuracy=0.9, mse=2.4, conflicts=(False,)),
    make_run("UPGrad", 1, accuracy=0.9, mse=2.4, conflicts=(False,)),
]


def near(mean, error):
    return Estimate(pytest.approx(mean), pytest.approx(error, abs=1e-9))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_comparison_worked_by_hand(split):
    problem = ByHand(title="by hand", tasks=("a", "b"), epochs=1)
    singles = final_metrics(problem, group(RUNS)[Variant(SINGLE_TASK)].values(), split)
    assert singles == {"accuracy": near(0.8, 0.1), "mse": near(2.0, 1.0)}
    plain, cost, upgrad = summarize(problem, RUNS, split)
    assert [str(summary.variant) for summary in (plain, cost, upgrad)] == ["LS", "LS + COST", "UPGrad"]
    assert plain.metrics["accuracy"] == near(0.5, 0.1)
    assert plain.delta_m == near(31.25, 18.75)
    assert cost.delta_m == near(10.0, 15.0)
    assert upgrad.delta_m == near(3.75, 0.0)
    # Seed 0: 25 - 50, seed 1: -5 - 12.5.
    assert Estimate(cost.same_steps.mean, cost.same_steps.error) == near(-21.25, 3.75)
    assert plain.same_steps is None
    # Accuracy: UPGrad 0.9, COST 0.7, LS 0.5. MSE: COST 2.15, UPGrad 2.4, LS 2.5.
    assert [summary.mean_rank for summary in (plain, cost, upgrad)] == [3.0, 1.5, 1.5]
    assert [summary.conflict for summary in (plain, cost, upgrad)] == [0.75, 0.25, 0.0]
    table = markdown_table(problem, singles, [plain, cost, upgrad]).splitlines()
    assert table[2] == "| single-task | – | 0 |  |  | 0.800 | 2.000 |  |  |  |  |"
    assert table[4].startswith("| LS | COST | 10.0 ± 15.0 | -21.2 ± 3.")
    assert " 2/2 | 0.700 | 2.150 | 1.5 | 25% | 0/0 |" in table[4]


def test_the_interval_of_a_change():
    values = np.random.default_rng(1).normal(-1, 1, 10)
    change = paired_change(values)
    assert change.mean == pytest.approx(values.mean())
    assert change.low < change.mean < change.high
    assert (change.better, change.seeds) == ((values < 0).sum(), 10)
    assert change == paired_change(values)
    shifted = paired_change(values + 5)
    assert (shifted.low - 5, shifted.high - 5) == pytest.approx((change.low, change.high))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    samples = np.random.default_rng(0).normal(0, 1, (300, 5))
    changes = [paired_change(sample) for sample in samples]
    assert 0.91 <= np.mean([change.low < 0 < change.high for change in changes]) <= 0.98


def test_no_change_at_equal_time_before_the_first_evaluation_of_the_slower_run():
    records = [
        *(make_record(Variant(SINGLE_TASK), 0, task) for task in ("left", "right")),
        make_record(LS),
        make_record(COST, seconds=(3.0, 4.0)),
    ]
    _, slow = summarize(find_problem("digits:narrow"), records, "validation")
    assert slow.same_steps.mean == 0
    assert math.isnan(slow.same_time.mean)


def test_intervals_of_few_seeds_and_of_equal_values():
    few = paired_change([3.0, 4.0, 5.0])
    assert (few.mean, few.error) == (4.0, pytest.approx(1 / math.sqrt(3)))
    assert math.isnan(few.low)
    equal = paired_change([2.0] * 5)
    assert (equal.low, equal.high) == (2.0, 2.0)
