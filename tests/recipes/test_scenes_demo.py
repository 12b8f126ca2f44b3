"""Rooms as a data module, what can be predicted without looking, and the demo on them."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close

from recipes.dense.mean_predictor import MeanPredictor
from recipes.scenes import demo
from recipes.scenes.problems import PROBLEMS, RoomsDataModule
from tests.support.dense_models import tiny
from tests.support.nets import make_trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lightning_cost" / "scenes"


SIZE = (3, 1, 32, 32)


def test_rooms_are_drawn_once_into_the_cache(cache: Path, capsys: pytest.CaptureFixture[str]):
    data = RoomsDataModule(["depth"], SIZE, batch_size=1)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(tiny(tasks=["depth"], network="segnet"), data)
    assert trainer.global_step == 3
    assert {path.name for path in cache.iterdir()} == {"rooms-3-1-32x32"}
    assert "4/4" in capsys.readouterr().err
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    assert len(written) == 4 * 4
    RoomsDataModule(None, SIZE).prepare_data()
    assert written == {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    assert capsys.readouterr().err == ""


def test_faces_are_drawn_once_into_the_cache_and_have_forty_tasks(cache: Path, capsys: pytest.CaptureFixture[str]):
    problem = replace(PROBLEMS["faces"], num_train=8, num_val=4, num_test=4, width=1, batch_size=4)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(problem.make_model(problem.tasks, None), problem.make_data(problem.tasks, seed=0))
    assert trainer.global_step == 2
    assert len([name for name in trainer.callback_metrics if name.startswith("train/") and "loss" in name]) >= 40
    assert {path.name for path in cache.iterdir()} == {"faces-8-4-4"}
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.jpg")}
    assert len(written) == 16
    capsys.readouterr()
    problem.make_data(problem.tasks, seed=1).prepare_data()
    assert written == {path: path.stat().st_mtime_ns for path in cache.rglob("*.jpg")}
    assert capsys.readouterr().err == ""


def test_a_run_on_rooms_goes_on_from_its_checkpoint(cache: Path, tmp_path: Path):
    data = RoomsDataModule(["depth"], SIZE, batch_size=1)
    model, checkpoint = tiny(tasks=["depth"], network="segnet"), ModelCheckpoint(tmp_path)
    make_trainer(max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True).fit(model, data)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, data, ckpt_path=checkpoint.best_model_path)
    assert trainer.global_step == 6


def test_the_mean_predictor_by_numpy():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 3, (2, 5, 6))
    labels[labels == 1] = 2
    depth = rng.uniform(1, 5, (2, 1, 5, 6)).astype(np.float32) * (rng.random((2, 1, 5, 6)) < 0.7)
    normals = rng.normal(np.reshape([1, 2, 0], (3, 1, 1)), size=(2, 3, 5, 6)).astype(np.float32)
    normals *= rng.random((2, 1, 5, 6)) < 0.7
    examples: list[dict[str, Tensor]] = [
        {"segmentation": torch.tensor(labels[i]), "depth": torch.tensor(depth[i]), "normals": torch.tensor(normals[i])}
        for i in range(2)
    ]
    predictor = MeanPredictor(examples, {"segmentation": 3, "depth": 1, "normals": 3})
    predictions = predictor(torch.zeros(4, 3, 7, 8))
    assert {name: tuple(x.shape) for name, x in predictions.items()} == {
        "segmentation": (4, 3, 7, 8),
        "depth": (4, 1, 7, 8),
        "normals": (4, 3, 7, 8),
    }
    shares = predictions["segmentation"].softmax(dim=1)[3, :, 6, 7]
    counts = [(labels == c).sum() for c in range(3)]
    assert_close(shares, torch.tensor(counts / np.sum(counts), dtype=torch.float32))
    assert counts[1] == 0
    assert predictions["segmentation"].isfinite().all()
    assert_close(predictions["depth"][0, 0, 0, 0].item(), float(depth[depth > 0].mean()), rtol=1e-6, atol=0)
    mean = normals.sum(axis=(0, 2, 3))
    assert_close(predictions["normals"][2, :, 1, 5].numpy(), (mean / np.linalg.norm(mean)).astype(np.float32))


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="must have a pixel whose depth is known"):
        MeanPredictor([{"depth": torch.zeros(1, 4, 4)}], {"depth": 1})


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of the demo, and what it prints."""
    folder = tmp_path_factory.mktemp("scenes")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("XDG_CACHE_HOME", str(folder))
        arguments = ["--quick", "--jobs", "1", "--output", str(folder / "out")]
        assert demo.main(arguments) == 0
    return folder / "out", printed.getvalue()


def test_the_demo_compares_with_the_mean_of_the_targets(shown: tuple[Path, str]):
    with (shown[0] / "scenes_metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = {row.pop("row"): {name: float(x) for name, x in row.items()} for row in csv.DictReader(file)}
    assert list(rows) == ["mean of the targets", "single-task", "FairGrad", "FairGrad + COST"]
    assert all(set(row) == set(PROBLEMS["rooms"].higher_is_better) for row in rows.values())
    assert all(math.isfinite(x) for row in rows.values() for x in row.values())
    assert rows["mean of the targets"]["relative_error"] < 0.6


def test_the_demo_names_what_it_writes(shown: tuple[Path, str]):
    named = [Path(line.split(".png  ")[0] + ".png") for line in shown[1].splitlines() if ".png  " in line]
    assert all(path.stat().st_size > 0 for path in named)
    # Of five epochs every second one is validated, and what the last one leaves after training.
    drawn = sorted(path.parts[-2:] for path in named if path.parent != shown[0])
    assert drawn == [("confusion", "validation.png")] * 2 + [("pictures", "validation.png")] * 2
    assert "FairGrad + COST" in shown[1]
