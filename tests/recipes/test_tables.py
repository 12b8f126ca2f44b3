"""Tables of the paper from drawn data: what is trained, what is taken again, and what stands in the table."""

import csv
import importlib
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from lightning_cost import SymmetryTeleportCallback
from lightning_cost.metrics import delta_m
from recipes.methods import METHODS
from recipes.scenes.writers import write_celeba, write_cityscapes
from recipes.tables import BENCHMARKS, COSTS, METHOD_LAYERS, Run, result_of, rows_of
from recipes.tables import runs as runs_module
from recipes.tables.__main__ import main
from recipes.tables.table import headings, to_markdown
from tests.support.qm9_runs import SIZES, cache_home, folder, needs_the_extra

pytestmark = pytest.mark.slow

__all__ = ["cache_home", "folder"]  # Fixtures.

QUIET = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false")
SMALL = {
    "cityscapes": (
        "model.network=segnet",
        "model.widths=[2, 4, 4, 4, 4]",
        "data.num_workers=0",
        "data.batch_size=2",
    ),
    "celeba": ("model.width=1", "data.image_size=8", "data.batch_size=8"),
    "qm9": (
        "model.width=8",
        "model.edge_hidden=4",
        "data.batch_size=24",
        *(f"data.{name}={value}" for name, value in SIZES.items()),
    ),
}


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp("streets"), 4, 2, height=32, width=32)


@pytest.fixture
def started(monkeypatch):
    """Commands that were run. They run in this process, because to import PyTorch takes as long as such a run."""
    commands = []

    def run_here(command, log, environment):
        commands.append(command[3:])
        module, arguments = command[2], command[3:]
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(f"{module}.__main__").main(arguments)
        return 0

    monkeypatch.setattr(runs_module, "_status", run_here)
    return commands


def arguments(benchmark, output, *options, data=None):
    data = [] if data is None else ["--data", str(data)]
    return [benchmark, *data, "--output", str(output), "--jobs", "1", *options, "--set", *SMALL[benchmark], *QUIET]


def lines_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_cityscapes_from_the_command_to_the_table(streets, tmp_path, started, capsys):
    command = arguments(
        "cityscapes", tmp_path, "--methods", "LS", "IMTL", "--seeds", "1", "--epochs", "1", data=streets
    )
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert len(started) == 4
    assert {"LS", "LS + COST", "IMTL + COST", "75.18", "22.60"} <= {cell.strip() for cell in printed.split("│")}
    runs = lines_of(tmp_path / "cityscapes_runs.csv")
    assert [(line["method"], line["seed"]) for line in runs[:3]] == [("LS", "0"), ("LS + COST", "0"), ("IMTL", "0")]
    for line in runs:
        metrics = torch.tensor([float(line[c.metric]) for c in BENCHMARKS["cityscapes"].columns])
        expected = delta_m(metrics, [0.7401, 0.9316, 0.0125, 27.77], [True, True, False, False])
        assert float(line["delta_m"]) == pytest.approx(expected.item(), rel=1e-4)
    table = (tmp_path / "cityscapes.md").read_text(encoding="utf-8")
    assert "| LS | paper |  | 75.18 | 93.49 | 0.0155 | 46.77 | 8.25 | 22.60 |" in table
    assert "| LS + COST | ours | 1 |" in table
    # A second call takes what is there.
    assert main(command) == 0
    assert len(started) == 4
    # A run that was killed goes on from its last checkpoint.
    killed = tmp_path / "cityscapes" / "ls" / "seed_0"
    before = json.loads((killed / "last_10.json").read_text())
    (killed / "last_10.json").unlink()
    assert main(command) == 0
    assert started[4][-2:] == ["--ckpt_path", str(killed / "checkpoints" / "last.ckpt")]
    assert json.loads((killed / "last_10.json").read_text()) == before
    # Other settings are not taken for these.
    assert main([*command, "model.lr=0.1"]) == 1
    assert "run with other settings" in capsys.readouterr().out


def test_celeba_reports_the_test_of_the_best_validation(tmp_path, started):
    data = write_celeba(tmp_path / "faces", 16, 8, 8, seed=0)
    output = tmp_path / "output"
    assert main(arguments("celeba", output, "--cost", "none", "--seeds", "1", "--epochs", "1", data=data)) == 0
    assert [command[0] for command in started] == ["fit", "test"]
    assert started[1][-1] == str(output / "celeba" / "fairgrad_public" / "seed_0" / "checkpoints" / "best.ckpt")
    (line,) = lines_of(output / "celeba_runs.csv")
    assert len([name for name in line if name.endswith("_f1")]) == 41
    assert "| FairGrad | paper |  | 6.35 | 1.15 |" in (output / "celeba.md").read_text()


@needs_the_extra
@pytest.mark.usefixtures("folder")
def test_qm9_needs_no_folder(tmp_path, started):
    assert (
        main(arguments("qm9", tmp_path, "--methods", "Nash-MTL", "--cost", "none", "--seeds", "1", "--epochs", "1"))
        == 0
    )
    (line,) = lines_of(tmp_path / "qm9_runs.csv")
    assert math.isfinite(float(line["mu_mae"]))
    made = yaml.safe_load((tmp_path / "qm9" / "nash_mtl" / "seed_0" / "run.yaml").read_text())
    assert made["model"]["mtl_method"]["init_args"]["n_tasks"] == 11


def test_a_real_process_is_started_and_its_error_shown(streets, tmp_path, capsys):
    command = arguments("cityscapes", tmp_path, "--methods", "LS", "--cost", "none", "--seeds", "1", data=streets)
    assert main([*command, "data.batch_size=-1"]) == 1
    printed = capsys.readouterr().out
    assert "The run 'cityscapes/ls/seed_0' failed. The end of" in printed
    assert "batch_size" in printed


def test_what_the_arguments_lack_is_an_error(tmp_path, capsys):
    assert main(["nyuv2", "--output", str(tmp_path)]) == 1
    assert "`--data` must name the folder of nyuv2" in capsys.readouterr().out
    assert main(["qm9", "--output", str(tmp_path), "--set", "batch_size=4"]) == 1
    assert "`--set` takes options" in capsys.readouterr().out
    assert main(["qm9", "--output", str(tmp_path), "--set", "trainer.callbacks+.x=1"]) == 1
    assert "`--set` cannot set 'trainer.callbacks+.x'" in capsys.readouterr().out


@pytest.mark.parametrize("cost", COSTS)
def test_a_setting_of_cost_is_that_of_the_callback(cost, tmp_path):
    made = Run("celeba", "UPGrad", cost, 3, tmp_path).configuration()
    callbacks = [c for c in made["trainer"]["callbacks+"] if "Teleport" in c["class_path"]]
    assert len(callbacks) == (cost != "none")
    if cost == "paper":
        assert callbacks[0]["init_args"]["start_epoch"] == 4
        assert callbacks[0]["init_args"]["max_per_epoch"] == SymmetryTeleportCallback.paper().schedule.max_per_epoch
    assert made["seed_everything"] == made["data"]["shuffle_seed"] == 3


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_method_gets_the_number_of_tasks(benchmark, tmp_path):
    num_tasks = BENCHMARKS[benchmark].num_tasks
    for method, argument in {"Nash-MTL": "n_tasks", "FAMO": "shape", "UW": "shape"}.items():
        made = Run(benchmark, method, "none", 0, tmp_path).configuration()
        assert made["model"]["mtl_method"]["init_args"][argument] == num_tasks
    imtl = Run(benchmark, "IMTL", "none", 0, tmp_path).configuration()["trainer"]["callbacks+"]
    assert imtl[0]["init_args"] == {"num_tasks": num_tasks}


def test_every_method_has_a_layer_and_every_published_row_a_method():
    assert set(METHODS) < set(METHOD_LAYERS)
    for benchmark in BENCHMARKS.values():
        methods = {label.removesuffix(" + COST") for label in benchmark.published} - {"Independent"}
        assert methods <= set(METHOD_LAYERS)
        for figures in benchmark.published.values():
            assert len(figures) == benchmark.shown + 2


@pytest.mark.parametrize("name", ["cityscapes", "nyuv2"])
def test_the_published_rows_agree_with_themselves(name):
    """Δm of the paper's own columns (Eq. 14) is the paper's Δm, as far as its rounding of the columns allows."""
    benchmark = BENCHMARKS[name]
    single = [value / c.factor for value, c in zip(benchmark.published["Independent"], benchmark.columns, strict=False)]
    directions = [column.higher_is_better for column in benchmark.columns]
    for label, (*shown, _, delta) in benchmark.published.items():
        if label == "Independent" or shown[0] is None:
            continue
        values = [value / column.factor for value, column in zip(shown, benchmark.columns, strict=True)]
        slack = 2.0 if name == "nyuv2" else 0.6
        assert delta_m(torch.tensor(values), single, directions).item() == pytest.approx(delta, abs=slack), label


def test_rows_by_hand():
    benchmark = BENCHMARKS["cityscapes"]
    names = [column.metric for column in benchmark.columns]
    good, bad = ((0.8, 0.9, 0.01, 20.0), (0.6, 0.8, 0.02, 40.0))
    results = {
        "LS": [
            dict(zip(names, bad, strict=True)) | {"delta_m": 10.0},
            dict(zip(names, bad, strict=True)) | {"delta_m": 14.0},
        ],
        "UPGrad": [dict(zip(names, good, strict=True)) | {"delta_m": -1.0}],
    }
    rows = rows_of(benchmark, results)
    assert [(row.label, row.source) for row in rows] == [
        ("Independent", "paper"),
        ("LS", "ours"),
        ("LS", "paper"),
        ("UPGrad", "ours"),
    ]
    assert rows[1].cells(benchmark) == ["LS", "ours", "2", "60.00", "80.00", "0.0200", "40.00", "2.00", "12.00 ± 2.83"]
    assert rows[3].cells(benchmark) == ["UPGrad", "ours", "1", "80.00", "90.00", "0.0100", "20.00", "1.00", "-1.00"]
    assert headings(benchmark)[3] == "mIoU ↑"
    assert to_markdown(benchmark, rows, "caption").count("\n| ") == 6


def test_a_run_without_a_result_is_missing(tmp_path):
    run = Run("qm9", "LS", "none", 0, tmp_path)
    assert result_of(run) is None
    assert replace(run, cost="deferred").label == "LS + COST, deferred"
    assert replace(run, cost="deferred").name == "qm9/ls_cost_deferred/seed_0"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"means": {"x": "?"}}'])
@pytest.mark.parametrize(("benchmark", "name"), [("qm9", "test.json"), ("cityscapes", "last_10.json")])
def test_a_file_that_cannot_be_read_is_named(benchmark, name, text, tmp_path):
    run = Run(benchmark, "LS", "none", 0, tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} cannot be read.*Delete it"):
        result_of(run)
    (run.folder / name).unlink()
    (run.folder / "run.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"run\.yaml cannot be read"):
        result_of(run)
