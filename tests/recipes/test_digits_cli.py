"""Every configuration of the digits recipe, through the real command line."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from torchjd.aggregation import FairGrad, UPGrad

from lightning_cost import SymmetryTeleportCallback
from recipes.digits.__main__ import main
from recipes.methods import PublicFairGrad

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "recipes" / "digits"
METHODS = {
    "ls": type(None),
    "cost": type(None),
    "paper": PublicFairGrad,
    "upgrad": UPGrad,
    "upgrad_cost": UPGrad,
    "fairgrad": FairGrad,
    "fairgrad_cost": FairGrad,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["digits"])

    def run(subcommand, name, *options):
        return main([subcommand, "--config", str(CONFIGS / f"{name}.yaml"), *options])

    return run


SHORT = (
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
)


def test_every_configuration_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_trains(run, name, tmp_path):
    cli = run("fit", name, *SHORT)
    assert cli.trainer.global_step == 4
    assert type(cli.model.mtl_method) is METHODS[name]
    assert cli.model.heads["left"].in_features == 16
    assert cli.model.loss_weights == {"left": 1.0, "right": 0.03}
    callbacks = [callback for callback in cli.trainer.callbacks if isinstance(callback, SymmetryTeleportCallback)]
    assert len(callbacks) == (name == "paper" or name.endswith("cost"))
    assert {"val/left_accuracy", "val/right_accuracy"} <= set(cli.trainer.callback_metrics)
    assert (tmp_path / "lightning_logs" / "digits" / name / "version_0" / "metrics.csv").is_file()


def settings(value):
    if isinstance(value, PeftConfig):
        return value.to_dict()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if type(value).__module__.startswith("lightning_cost"):
        return type(value), {name: settings(item) for name, item in vars(value).items()}
    return value


def test_the_paper_configuration_is_the_one_of_the_callback(run):
    cli = run("validate", "paper", *SHORT[2:])
    callback = next(item for item in cli.trainer.callbacks if isinstance(item, SymmetryTeleportCallback))
    del callback.log, callback.log_dict  # The Trainer attaches them.
    assert settings(callback) == settings(SymmetryTeleportCallback.paper(start_epoch=2))


def test_the_other_subcommands_take_the_checkpoint(run):
    fitted = run("fit", "ls", *SHORT)
    checkpoint = fitted.trainer.checkpoint_callback.best_model_path
    for subcommand, stage in (("validate", "val"), ("test", "test")):
        cli = run(subcommand, "ls", f"--ckpt_path={checkpoint}", *SHORT[2:])
        assert set(cli.trainer.callback_metrics) == {f"{stage}/left_accuracy", f"{stage}/right_accuracy"}
        for name, value in fitted.model.state_dict().items():
            assert torch.equal(cli.model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("tasks", "logged"),
    [("[ink]", {"ink_mse"}), ("[sum, ink, larger]", {"sum_accuracy", "ink_mse", "larger_accuracy"})],
)
def test_the_tasks_decide_which_targets_the_data_carry(run, tasks, logged):
    cli = run("fit", "ls", f"--model.tasks={tasks}", "--model.loss_weights=null", "--model.width=8", *SHORT)
    names = tasks[1:-1].split(", ")
    assert list(next(iter(cli.datamodule.train_dataloader()))) == ["image", *names]
    assert list(cli.model.heads) == names
    assert {name for name in cli.trainer.callback_metrics if name.startswith("val/")} == {f"val/{n}" for n in logged}


def test_the_learning_rate_can_drop(run):
    cli = run("fit", "ls", "--model.lr_milestones=[1]", "--model.lr_factor=0.5", *SHORT)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.5e-3


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"]])
def test_help(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["digits", *arguments])
    monkeypatch.delitem(sys.modules, "recipes.digits.__main__")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("recipes.digits", run_name="__main__")
    assert stop.value.code == 0
    assert ("--model.width" if "fit" in arguments else "Available subcommands") in capsys.readouterr().out
