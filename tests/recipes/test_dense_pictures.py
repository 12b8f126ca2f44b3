"""Pictures of dense predictions: drawn when they are due, of what the model predicts, and without a say in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.testing import assert_close
from torchjd.aggregation import UPGrad

from recipes.common.figures import to_pixels
from recipes.dense.figures import class_colors, confusion_figure, examples_figure
from recipes.dense.last_epochs import LastEpochsMean
from recipes.dense.model import DenseModel
from recipes.dense.pictures import ConfusionMatrixPlot, DensePictures
from recipes.nyuv2 import NYUV2, NYUv2DataModule
from tests.support.dense_files import write_random
from tests.support.dense_models import Metrics, lively, logged, tiny
from tests.support.nets import make_mlp, make_trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("nyuv2"), NYUV2, num_train=4, num_val=4, height=32, width=32)


def test_pictures_are_drawn_when_they_are_due_and_change_nothing(root: Path, tmp_path: Path):
    def fit(*callbacks: L.Callback) -> tuple[DenseModel, Metrics, list[int], Tensor]:
        torch.manual_seed(0)
        model = tiny(network="segnet", mtl_method=UPGrad())
        loggers = [CSVLogger(tmp_path, version=0), TensorBoardLogger(tmp_path, name="board", version=0)]
        logger = loggers if callbacks else False
        trainer = make_trainer(max_epochs=3, limit_train_batches=1, callbacks=list(callbacks), logger=logger)
        trainer.fit(model, NYUv2DataModule(root))
        return model, logged(trainer), [m.training for m in model.modules()], torch.get_rng_state()

    model, metrics, modes, rng = fit(DensePictures(every_n_epochs=2, num=1), ConfusionMatrixPlot(every_n_epochs=3))
    plain, plain_metrics, plain_modes, plain_rng = fit()
    assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert (metrics, modes) == (plain_metrics, plain_modes)
    assert torch.equal(rng, plain_rng)

    folder = tmp_path / "lightning_logs" / "version_0"
    drawn = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    # Every second epoch and the last one; epochs are counted from 0.
    assert drawn == {"pictures/epoch_001.png", "pictures/epoch_002.png", "confusion/epoch_002.png"}
    board = EventAccumulator(str(tmp_path / "board" / "version_0")).Reload()
    assert [event.step for event in board.Images("pictures")] == [2, 3]
    pixels = np.asarray(Image.open(folder / "pictures" / "epoch_002.png"))
    height, width = pixels.shape[:2]
    assert (board.Images("pictures")[1].width, board.Images("pictures")[1].height) == (width, height)


def test_a_validation_on_its_own_is_drawn_and_without_classes_there_is_no_confusion(root: Path, tmp_path: Path):
    trainer = make_trainer(callbacks=[DensePictures(1, 1), ConfusionMatrixPlot(1)], default_root_dir=tmp_path)
    trainer.validate(tiny(tasks=["normals"]), NYUv2DataModule(root, tasks=["normals"]), verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def drawn_in(monkeypatch: pytest.MonkeyPatch, function: str) -> list[tuple[Any, ...]]:
    """What a figure is drawn of, without drawing it."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(f"recipes.dense.pictures.{function}", lambda *args: calls.append(args) or Figure((1, 1)))
    return calls


def test_the_grid_shows_what_is_true_beside_what_is_predicted():
    labels = torch.tensor([[0, 12], [-1, 3]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 12], [5, 3]]), 13).movedim(-1, 0).float()
    depth, normals = torch.tensor([[[1.0, 4.0], [0.0, 2.0]]]), torch.zeros(3, 2, 2)
    normals[:, 0, 0], normals[:, 1, 1] = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, -1.0, 0.0])
    example = {
        "image": torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0)),
        "segmentation": labels,
        "depth": depth,
        "normals": normals,
        "predicted_segmentation": logits,
        "predicted_depth": depth + 1,
        "predicted_normals": -normals,
    }
    figure = examples_figure(NYUV2, [example], "title")
    shown = [axes.images[0] for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes][1::2] == ["classes, true", "depth, true", "normals, true"]
    image, true_labels, chosen, true_depth, predicted_depth, true_normals, predicted_normals = (
        np.ma.filled(np.ma.masked_array(x.get_array()).astype(float), np.nan) for x in shown
    )
    assert_close(torch.tensor(image, dtype=torch.float32), example["image"].movedim(0, -1))
    assert (true_labels == labels.numpy()).all()
    assert (chosen == [[1, 12], [5, 3]]).all()
    colors = shown[1].cmap(shown[1].norm(np.array([-1, 0, 3, 12])))[:, :3]
    np.testing.assert_allclose(colors, [[0.85] * 3, *class_colors(13)[[0, 3, 12]]])
    np.testing.assert_array_equal(true_depth, [[1, 4], [np.nan, 2]])
    np.testing.assert_array_equal(predicted_depth, [[2, 5], [1, 3]])
    assert {(x.norm.vmin, x.norm.vmax) for x in shown[3:5]} == {(0, 4)}
    gray = [0.85] * 3
    np.testing.assert_allclose(true_normals, [[[1, 0.5, 0.5], gray], [gray, [0.5, 0, 0.5]]], atol=1e-6)
    np.testing.assert_allclose(predicted_normals, [[[0, 0.5, 0.5], gray], [gray, [0.5, 1, 0.5]]], atol=1e-6)


def test_a_fast_dev_run_leaves_nothing_behind(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    callbacks = [DensePictures(1), ConfusionMatrixPlot(1), LastEpochsMean()]
    make_trainer(callbacks=callbacks, fast_dev_run=True).fit(tiny(network="segnet"), NYUv2DataModule(root))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("num", "batches"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2, 3])])
def test_pictures_show_what_the_model_predicts_of_evenly_spread_batches(
    num: int, batches: list[int], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = drawn_in(monkeypatch, "examples_figure")
    model, data = lively(network="segnet"), NYUv2DataModule(root, batch_size=1)
    make_trainer(callbacks=[DensePictures(1, num)], default_root_dir=tmp_path).validate(model, data, verbose=False)
    layout, examples, title = calls[0]
    assert (layout, title) == (NYUV2, "NYUv2, validation")
    expected = [batch for index, batch in enumerate(data.val_dataloader()) if index in batches]
    for example, batch in zip(examples, expected, strict=True):
        assert all(torch.equal(example[name], values[0]) for name, values in batch.items())
        for task, prediction in model.eval()(batch["image"]).items():
            assert_close(example[f"predicted_{task}"], prediction[0])


def test_the_confusion_matrix_is_that_of_the_whole_split(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = drawn_in(monkeypatch, "confusion_figure")
    model, data = lively(network="segnet"), NYUv2DataModule(root)
    make_trainer(callbacks=[ConfusionMatrixPlot(1)], default_root_dir=tmp_path).validate(model, data, verbose=False)
    counts, classes, _ = calls[0]
    expected = np.zeros((13, 13))
    for batch in data.val_dataloader():
        chosen, known = model.eval()(batch["image"])["segmentation"].argmax(1), batch["segmentation"] >= 0
        np.add.at(expected, (batch["segmentation"][known].numpy(), chosen[known].numpy()), 1)
    assert (counts.numpy() == expected).all()
    assert classes == NYUV2.classes


def test_rows_of_the_confusion_figure_are_shares_of_the_true_class():
    figure = confusion_figure(torch.tensor([[3, 1], [0, 0]]), ("road", "sky"), "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.75", "0.25", "0.0", "0.0"]
    assert to_pixels(figure).shape[-1] == 3


@pytest.mark.parametrize("callback", [DensePictures, ConfusionMatrixPlot])
def test_other_models_and_bad_arguments_are_refused(callback: type[L.Callback], root: Path):
    class Other(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make_mlp(1, 1)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    with pytest.raises(MisconfigurationException, match="draws what a DenseModel predicts; got a Other"):
        make_trainer(callbacks=[callback()]).validate(Other(), NYUv2DataModule(root), verbose=False)
    with pytest.raises(ValueError, match="every_n_epochs=0 must be at least 1"):
        callback(every_n_epochs=0)  # type: ignore[call-arg]
    if callback is DensePictures:
        with pytest.raises(ValueError, match="num=0 must be at least 1"):
            DensePictures(num=0)
