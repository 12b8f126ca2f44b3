"""The command line, the configurations and the demo of QM9."""

import contextlib
import csv
import io
import math
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torchjd.aggregation import CAGrad, FairGrad, NashMTL, UPGrad

from lightning_cost import SymmetryTeleportCallback
from recipes.qm9 import demo
from recipes.qm9.__main__ import main
from recipes.qm9.problems import PROBLEMS
from tests.support.qm9_runs import SIZES, cache_home, folder, needs_the_extra

__all__ = ["cache_home", "folder"]  # Fixtures.

pytestmark = [pytest.mark.slow, needs_the_extra, pytest.mark.usefixtures("folder")]

CONFIGS = Path(__file__).parents[2] / "recipes" / "qm9"
METHODS = {"ls": type(None), "cagrad": CAGrad, "nash_mtl": NashMTL, "fairgrad": FairGrad, "upgrad": UPGrad}
PRESETS = {"small", "gpu_short"}

SHORT = (
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=2",
    "--trainer.enable_progress_bar=false",
    "--model.width=8",
    "--model.edge_hidden=4",
    "--data.batch_size=24",
    *(f"--data.{name}={value}" for name, value in SIZES.items()),
)


LONGER = (*SHORT, "--trainer.max_epochs=3", "--trainer.limit_train_batches=1.0")


def test_there_is_a_configuration_for_every_method_with_and_without_cost():
    wanted = {f"{name}{suffix}" for name in METHODS for suffix in ("", "_cost")}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == wanted | PRESETS | {"paper"}


@pytest.mark.parametrize("suffix", ["", "_cost"])
@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_trains(name, suffix):
    cli = main(["fit", "--config", str(CONFIGS / f"{name}{suffix}.yaml"), *SHORT])
    assert cli.trainer.global_step == 4
    assert type(cli.model.mtl_method) is METHODS[name]
    callbacks = [callback for callback in cli.trainer.callbacks if isinstance(callback, SymmetryTeleportCallback)]
    assert len(callbacks) == bool(suffix)
    assert all(callback.reports and callback.reports[0].accepted for callback in callbacks)
    assert math.isfinite(cli.trainer.callback_metrics["val/delta_m"])


def test_the_configuration_of_the_paper_has_its_settings():
    cli = main(["fit", "--config", str(CONFIGS / "paper.yaml"), *SHORT])
    (callback,) = [item for item in cli.trainer.callbacks if isinstance(item, SymmetryTeleportCallback)]
    assert repr(callback) == repr(SymmetryTeleportCallback.paper(start_epoch=75))
    assert repr(cli.model.mtl_method) == "PublicFairGrad(alpha=2.0, max_norm=1.0)"


class Interruption(L.Callback):
    """Ends the training in the middle of its second epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 7:
            raise RuntimeError("interrupted")


def fit(*options):
    layers = ["--config", str(CONFIGS / "upgrad_cost.yaml")]
    return main(["fit", *layers, *LONGER, "--model.targets=[mu, homo]", *options])


def test_an_interrupted_run_goes_on_where_it_was(folder):
    with pytest.raises(RuntimeError, match="interrupted"):
        fit("--trainer.callbacks+=tests.recipes.test_qm9_cli.Interruption")
    last = next(folder.rglob("last.ckpt"))
    interrupted = torch.load(last, weights_only=False)
    # The checkpoint of the last epoch: an error within a step leaves it alone.
    assert interrupted["global_step"] == 5
    resumed = fit("--ckpt_path", str(last))
    assert resumed.trainer.global_step == 15
    assert set(interrupted["state_dict"]) == set(resumed.model.state_dict())


def test_the_last_checkpoint_is_the_newest_even_if_it_is_no_better(folder):
    fit("--model.lr=30")
    best, last = (torch.load(next(folder.rglob(f"{name}.ckpt")), weights_only=False) for name in ("best", "last"))
    assert last["epoch"] == 2
    assert best["epoch"] < 2


def test_the_options_of_the_callback_are_within_reach():
    layers = ["--config", str(CONFIGS / "fairgrad_cost.yaml")]
    cli = main(["fit", *layers, *SHORT, "--trainer.callbacks.check_every_n_steps", "4"])
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, SymmetryTeleportCallback))
    assert "check_every_n_steps=4" in repr(callback)


def test_short_trainings_on_a_gpu_count_molecules(folder):
    layers = ["--config", str(CONFIGS / "fairgrad_cost.yaml"), "--config", str(CONFIGS / "gpu_short.yaml")]
    cli = main(["fit", *layers, *SHORT, "--model.targets=[mu, homo]", "--trainer.log_every_n_steps=1"])
    assert cli.model.schedule == "cosine"
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open(newline="", encoding="utf-8") as file:
        samples = [row["train/samples"] for row in csv.DictReader(file) if row.get("train/samples")]
    assert [float(value) for value in samples] == [24, 48, 72, 96]


def test_the_small_preset_is_the_problem_of_the_studies():
    settings, problem = yaml.safe_load((CONFIGS / "small.yaml").read_text()), PROBLEMS["small"]
    assert set(settings["model"].pop("single_task_maes")) == set(problem.tasks)
    values = settings["model"] | settings["data"] | {"epochs": settings["trainer"]["max_epochs"], "schedule": "plateau"}
    assert {name: getattr(problem, name) for name in values} == values


def test_a_preset_is_laid_over_a_configuration_and_its_checkpoint_tested(folder):
    layers = ["--config", str(CONFIGS / "fairgrad.yaml"), "--config", str(CONFIGS / "small.yaml")]
    cli = main(["fit", *layers, *SHORT, "--model.targets=[mu, homo]"])
    assert (cli.model.lr, cli.model.schedule) == (0.002, "plateau")
    logs = Path(cli.trainer.log_dir)
    best = logs / "checkpoints" / "best.ckpt"
    main(["test", *layers, *SHORT, "--model.targets=[mu, homo]", "--ckpt_path", str(best)])
    (figure,) = folder.rglob("parity.png")
    assert figure.parent == logs.resolve()


@pytest.mark.parametrize("suffix", ["", "_cost"])
@pytest.mark.parametrize("name", METHODS)
def test_the_protocol_is_that_of_the_benchmark(name, suffix):
    settings = yaml.safe_load((CONFIGS / f"{name}{suffix}.yaml").read_text())
    trainer, model = settings["trainer"], settings["model"]
    assert (trainer["max_epochs"], settings["data"]["batch_size"]) == (300, 120)
    assert (model["lr"], model["schedule"], model["width"]) == (1e-3, "plateau", 64)
    (best,) = (c["init_args"] for c in trainer["callbacks"] if c["class_path"].endswith("ModelCheckpoint"))
    assert best["monitor"] == "val/delta_m"
    assert sum(c["class_path"].endswith(".LastCheckpoint") for c in trainer["callbacks"]) == 1


def test_the_demo_compares_and_draws(folder):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert demo.main(["--quick", "--epochs", "2", "--jobs", "1", "--output", str(folder / "out")]) == 0
    (summary,) = (folder / "out").glob("*_summary.csv")
    with summary.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [(row["method"], row["callback"]) for row in rows]
    assert found == [("LS", ""), ("LS", "COST"), ("FairGrad", ""), ("FairGrad", "COST")]
    assert len(list((folder / "out").rglob("parity.png"))) == 4
    named = [line.split(".png  ")[0] + ".png" for line in printed.getvalue().splitlines() if ".png  " in line]
    assert len(named) >= 8
    assert all(Path(name).stat().st_size > 0 for name in named)
