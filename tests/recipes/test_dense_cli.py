"""Every configuration of NYUv2 and CityScapes on generated scenes, through the real command lines."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torchjd.aggregation import CAGrad, FairGrad, NashMTL

from lightning_cost import SymmetryTeleportCallback
from recipes.cityscapes import CityScapesDataModule, CityScapesModel
from recipes.dense.command import DenseCLI
from recipes.dense.last_epochs import LastEpochsMean
from recipes.dense.pictures import ConfusionMatrixPlot, DensePictures
from recipes.methods import PublicFairGrad
from recipes.nyuv2 import NYUv2DataModule, NYUv2Model
from recipes.nyuv2.__main__ import main as nyuv2
from recipes.scenes import write_cityscapes, write_nyuv2

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
CLASSES = {"nyuv2": (NYUv2Model, NYUv2DataModule), "cityscapes": (CityScapesModel, CityScapesDataModule)}
WRITERS = {"nyuv2": write_nyuv2, "cityscapes": write_cityscapes}
METHODS = {
    "ls": type(None),
    "cagrad": CAGrad,
    "nash_mtl": NashMTL,
    "fairgrad": FairGrad,
    "fairgrad_cost": FairGrad,
    "paper": PublicFairGrad,
}
PUBLISHED: dict[str, dict[str, float]] = {
    "ls": {},
    "cagrad": {"c": 0.4, "norm_eps": 1e-4},
    "nash_mtl": {"max_norm": 1.0, "update_weights_every": 1, "optim_niter": 20},
    "fairgrad": {"alpha": 2.0},
    "fairgrad_cost": {"alpha": 2.0},
    "paper": {"alpha": 2.0, "max_norm": 1.0},
}
TASKS = {"nyuv2": ["segmentation", "depth", "normals"], "cityscapes": ["segmentation", "depth"]}
SHORT = (
    "--model.widths=[2, 4, 4, 4, 4]",
    "--data.num_workers=0",
    "--data.batch_size=2",
    "--trainer.accelerator=cpu",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scenes")
    return {name: write(folder / name, 4, 2, height=32, width=32) for name, write in WRITERS.items()}


@pytest.fixture
def arguments(roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The command line for a configuration, in a folder where its logs may go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dense"])

    def arguments(recipe: str, name: str, *options: str) -> list[str]:
        config = RECIPES / recipe / f"{name}.yaml"
        return ["--config", str(config), "--data.root", str(roots[recipe]), *SHORT, *options]

    return arguments


def parse(recipe: str, arguments: list[str]) -> DenseCLI:
    """What the command line makes of its arguments. Without subcommands, each of which takes a parser, it is fast."""
    settings = {"seed_everything_default": 0, "auto_configure_optimizers": False, "run": False}
    return DenseCLI(*CLASSES[recipe], args=arguments, **settings)


def callbacks_of(cli: DenseCLI, kind: type) -> list[Any]:
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]


@pytest.mark.parametrize("recipe", CLASSES)
def test_configurations_are_the_protocol_and_differ_in_nothing_but_the_method(recipe: str):
    paths = list((RECIPES / recipe).glob("*.yaml"))
    assert {path.stem for path in paths} == set(METHODS)
    for path in paths:
        settings = yaml.safe_load(path.read_text())
        trainer = settings["trainer"]
        assert settings["data"] == {"batch_size": 2 if recipe == "nyuv2" else 8, "num_workers": 4, "seed": 0}
        method = settings["model"].pop("mtl_method", {"init_args": {}})["init_args"]
        assert method.pop("n_tasks", len(TASKS[recipe])) == len(TASKS[recipe])
        assert method == PUBLISHED[path.stem]
        assert settings["model"] == {"network": "mtan", "lr": 1e-4, "lr_milestones": [100], "lr_factor": 0.5}
        assert trainer["max_epochs"] == 200
        assert {logger["init_args"].pop("name") for logger in trainer["logger"]} == {f"{recipe}/{path.stem}"}
        others = [item for item in trainer["callbacks"] if not item["class_path"].endswith("TeleportCallback")]
        assert {**trainer, "callbacks": others} == common_trainer(recipe)


def common_trainer(recipe: str) -> dict[str, Any]:
    """That of the plainest configuration."""
    trainer = yaml.safe_load((RECIPES / recipe / "ls.yaml").read_text())["trainer"]
    for logger in trainer["logger"]:
        del logger["init_args"]["name"]
    return trainer


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recipe", CLASSES)
def test_a_configuration_trains(recipe: str, name: str, arguments: Callable[..., list[str]], tmp_path: Path):
    cli = parse(recipe, arguments(recipe, name, "--trainer.max_steps=2", "--trainer.limit_train_batches=2"))
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 2
    assert type(cli.model.mtl_method) is METHODS[name]
    assert list(cli.model.tasks) == TASKS[recipe]
    expected = {"fairgrad_cost": SymmetryTeleportCallback(), "paper": SymmetryTeleportCallback.paper(start_epoch=50)}
    teleports = callbacks_of(cli, SymmetryTeleportCallback)
    assert [repr(callback) for callback in teleports] == ([repr(expected[name])] if name in expected else [])
    assert all(len(callbacks_of(cli, kind)) == 1 for kind in (LastEpochsMean, DensePictures, ConfusionMatrixPlot))
    folder = tmp_path / "lightning_logs" / recipe / name / "version_0"
    assert {"metrics.csv", "last_10.json", "checkpoints"} <= {path.name for path in folder.iterdir()}
    assert list((tmp_path / "lightning_logs" / "tensorboard" / recipe / name / "version_0").glob("events*"))


@pytest.mark.parametrize("recipe", CLASSES)
def test_the_options_of_the_callback_are_within_reach(recipe: str, arguments: Callable[..., list[str]]):
    cli = parse(recipe, arguments(recipe, "fairgrad_cost", "--trainer.callbacks.check_every_n_steps", "4"))
    (callback,) = callbacks_of(cli, SymmetryTeleportCallback)
    assert "check_every_n_steps=4" in repr(callback)


def test_the_best_checkpoint_and_the_last_are_kept(arguments: Callable[..., list[str]], tmp_path: Path):
    options = ("--trainer.max_epochs=3", "--trainer.limit_train_batches=1", "--model.lr=0.1")
    cli = parse("cityscapes", arguments("cityscapes", "ls", *options))
    cli.trainer.fit(cli.model, cli.datamodule)
    best, last = (torch.load(next(tmp_path.rglob(f"{name}.ckpt")), weights_only=False) for name in ("best", "last"))
    with next(tmp_path.rglob("metrics.csv")).open(newline="", encoding="utf-8") as file:
        degradations = [float(row["val/delta_m"]) for row in csv.DictReader(file) if row["val/delta_m"]]
    assert best["epoch"] == np.argmin(degradations) < 2
    assert np.argmax(degradations) != np.argmin(degradations)
    assert last["epoch"] == 2


def test_the_command_line_trains_and_validates_some_tasks(arguments: Callable[..., list[str]], tmp_path: Path):
    options = arguments("nyuv2", "ls", "--model.tasks=[depth]", "--data.check=full", "--trainer.max_epochs=1")
    fitted = nyuv2(["fit", *options])
    assert list(next(iter(fitted.datamodule.train_dataloader()))) == ["image", "depth"]
    kept = {path.stem: str(path) for path in tmp_path.rglob("*.ckpt")}
    assert set(kept) == {"best", "last"}
    checkpoint = kept["last"]
    validated = nyuv2(["validate", *options, f"--ckpt_path={checkpoint}"])
    names = {"absolute_error", "relative_error", "delta_m"}
    assert set(validated.trainer.callback_metrics) == {f"val/{name}" for name in names}
    for name in names:
        assert validated.trainer.callback_metrics[f"val/{name}"] == fitted.trainer.callback_metrics[f"val/{name}"]
    drawn = sorted(path.parts[-3:] for path in (tmp_path / "lightning_logs").rglob("*.png"))
    assert drawn == [("version_0", "pictures", "epoch_000.png"), ("version_0", "pictures", "validation.png")]
