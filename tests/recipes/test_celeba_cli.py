"""Every configuration of the CelebA recipe, through the real command line."""

import csv
from pathlib import Path

import pytest
import torch
import yaml
from torchjd.aggregation import CAGrad, FairGrad, NashMTL

from lightning_cost import SymmetryTeleportCallback
from lightning_cost._training.engine import Engine
from recipes.celeba.__main__ import main
from recipes.celeba.attributes import ATTRIBUTES
from recipes.methods import PublicFairGrad
from recipes.scenes.writers import write_celeba

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "recipes" / "celeba"
METHODS = {
    "ls": type(None),
    "cagrad": CAGrad,
    "nash_mtl": NashMTL,
    "fairgrad": FairGrad,
    "fairgrad_cost": FairGrad,
    "paper": PublicFairGrad,
}
# Options address the last callback. Figures take as long as the rest of a run, and conic programs longer.
UNDRAWN = "--trainer.callbacks.every_n_epochs=9"
OPTIONS = {
    "cagrad": [UNDRAWN],
    "nash_mtl": [UNDRAWN, "--model.mtl_method.init_args.optim_niter=1"],
    "fairgrad": [UNDRAWN],
    "fairgrad_cost": ["--trainer.callbacks.start_epoch=0", "--trainer.callbacks.trigger=weak"],
    "paper": [],
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return write_celeba(tmp_path_factory.mktemp("faces"), 16, 8, 8, seed=0)


@pytest.fixture
def run(faces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["celeba"])
    small = {"data.root": faces, "data.cache_dir": faces, "data.image_size": 8, "data.batch_size": 8, "model.width": 1}
    small |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": False, "trainer.enable_model_summary": False}

    def run(subcommand, name, *options):
        arguments = [f"--{option}={value}" for option, value in small.items()]
        return main([subcommand, "--config", str(CONFIGS / f"{name}.yaml"), *arguments, *options])

    return run


def teleporter(cli):
    return next((item for item in cli.trainer.callbacks if isinstance(item, SymmetryTeleportCallback)), None)


def test_every_configuration_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(METHODS) == {"ls", *OPTIONS}


PUBLISHED = {
    "cagrad": {"c": 0.4},
    "nash_mtl": {"n_tasks": 40, "max_norm": 1.0, "update_weights_every": 1, "optim_niter": 20},
    **{key: {"alpha": 2.0} for key in ["fairgrad", "fairgrad_cost"]},
    "paper": {"alpha": 2.0, "max_norm": 1.0},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_is_the_protocol(name):
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    method = settings["model"].pop("mtl_method", None) or {"init_args": {}}
    assert method["init_args"] == PUBLISHED.get(name, {})
    assert settings["model"] == {"width": 64, "lr": 3e-4}
    assert settings["data"] == {"batch_size": 256, "image_size": 64, "shuffle_seed": 0}
    assert settings["trainer"]["max_epochs"] == 15
    callbacks = settings["trainer"]["callbacks"]
    (best,) = (c["init_args"] for c in callbacks if "ModelCheckpoint" in c["class_path"])
    assert (best["monitor"], best["mode"]) == ("val/mean_f1", "max")
    assert sum(c["class_path"].endswith(".LastCheckpoint") for c in callbacks) == 1


def check(cli, name, folder, steps):
    assert cli.trainer.global_step == steps
    assert type(cli.model.mtl_method) is METHODS[name]
    assert Engine(cli.model).names == ATTRIBUTES
    assert (teleporter(cli) is not None) == (name in {"paper", "fairgrad_cost"})
    assert {"metrics.csv", "config.yaml"} <= {path.name for path in (folder / "celeba" / name / "version_0").iterdir()}
    assert list((folder / "tensorboard" / "celeba" / name / "version_0").glob("events.*"))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_configuration_trains(run, name, tmp_path):
    cli = run("fit", name, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", *OPTIONS[name])
    check(cli, name, tmp_path / "lightning_logs", steps=2)
    assert cli.model.lr == 3e-4
    picture = tmp_path / "lightning_logs" / "celeba" / name / "version_0" / "f1_val.png"
    assert picture.is_file() == (UNDRAWN not in OPTIONS[name])
    if name == "fairgrad_cost":
        assert teleporter(cli).reports
    if name == "paper":
        assert repr(teleporter(cli)) == repr(SymmetryTeleportCallback.paper(start_epoch=4))


def test_the_best_epoch_is_kept_and_tested(run, tmp_path):
    # At this rate the best of these epochs is the sixth.
    fitted = run("fit", "ls", "--trainer.max_epochs=7", "--model.lr=0.003", UNDRAWN)
    check(fitted, "ls", tmp_path / "lightning_logs", steps=14)
    folder = tmp_path / "lightning_logs" / "celeba" / "ls" / "version_0"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    with (folder / "metrics.csv").open() as file:
        scores = [float(row["val/mean_f1"]) for row in csv.DictReader(file) if row["val/mean_f1"]]
    assert len(scores) == 7
    assert max(scores) > min(scores)
    best = folder / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(best)
    assert checkpoint["epoch"] == scores.index(max(scores))

    tested = run("test", "ls", f"--ckpt_path={best}")
    logged = {f"test/{name}_f1" for name in ATTRIBUTES} | {"test/mean_f1", "test/delta_m"}
    assert set(tested.trainer.callback_metrics) == logged
    for name, value in tested.model.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][name])
    assert (folder.with_name("version_0") / "f1_test.png").is_file()
