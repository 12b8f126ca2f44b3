"""Data of dense benchmarks: what is on disk is what is served, augmentation by hand, and the order of batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close

from recipes.cityscapes import CITYSCAPES, CityScapesDataModule
from recipes.common.loader import BatchSampler
from recipes.dense.augment import SCALES, View, augment
from recipes.dense.data import DenseDataModule
from recipes.dense.examples import DenseExamples, ExampleLoader
from recipes.nyuv2 import NYUV2, NYUv2DataModule
from tests.support.dense_files import random_example, ready, write_random
from tests.support.nets import make_trainer

MODULES = {"nyuv2": NYUv2DataModule, "cityscapes": CityScapesDataModule}
both = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


@pytest.fixture(scope="module")
def nyuv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("nyuv2"), NYUV2, num_train=7)


# ------------------------------------------------------------------------------------------------- what is on disk


@both
@pytest.mark.parametrize(("dtype", "label_dtype"), [("f4", "i8"), ("f8", "f4"), ("f2", "i1")])
def test_batches_hold_what_is_on_disk(module: type[DenseDataModule], dtype: str, label_dtype: str, tmp_path: Path):
    layout = module.layout
    write_random(tmp_path, layout, 2, 3, dtype=dtype, label_dtype=label_dtype)
    data = ready(module, tmp_path, batch_size=2)
    batches = list(data.val_dataloader())
    assert [len(batch["image"]) for batch in batches] == [2, 1]
    served = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    folders = {"image": "image", "segmentation": layout.label_folder, "depth": "depth", "normals": "normal"}
    assert set(served) == {"image", *layout.tasks}
    for name, values in served.items():
        stored = np.stack([np.load(tmp_path / "val" / folders[name] / f"{i}.npy") for i in range(3)])
        if name == "segmentation":
            assert (values.dtype, values.shape) == (torch.int64, (3, 32, 64))
            assert (values.numpy() == stored).all()
        else:
            assert values.dtype == torch.float32
            assert (values.numpy() == stored.transpose(0, 3, 1, 2).astype(np.float32)).all()
    assert all((a["image"] == b["image"]).all() for a, b in zip(batches, data.test_dataloader(), strict=True))


def test_depth_needs_no_axis_for_its_only_channel(tmp_path: Path):
    write_random(tmp_path, CITYSCAPES, 1, 1)
    expected = next(iter(ready(CityScapesDataModule, tmp_path, "validate").val_dataloader()))["depth"]
    path = tmp_path / "val" / "depth" / "0.npy"
    np.save(path, np.load(path)[..., 0])
    assert_close(next(iter(ready(CityScapesDataModule, tmp_path, "test").val_dataloader()))["depth"], expected)


def test_only_the_targets_of_the_tasks_are_needed(tmp_path: Path):
    write_random(tmp_path, NYUV2, 2, 2)
    for split in ("train", "val"):
        (tmp_path / split / "normal").rename(tmp_path / split / "elsewhere")
    data = ready(NYUv2DataModule, tmp_path, tasks=["depth", "segmentation"])
    assert list(next(iter(data.train_dataloader()))) == ["image", "depth", "segmentation"]
    with pytest.raises(FileNotFoundError, match=r"no folder .*normal"):
        ready(NYUv2DataModule, tmp_path)


def test_the_tasks_do_not_change_the_augmentation(nyuv2: Path):
    every, some = (
        next(iter(ready(NYUv2DataModule, nyuv2, tasks=tasks).train_dataloader())) for tasks in (None, ["depth"])
    )
    assert set(some) == {"image", "depth"}
    assert all(torch.equal(values, every[name]) for name, values in some.items())


@both
def test_defaults_are_those_of_the_benchmark(module: type[DenseDataModule]):
    data = module("somewhere")
    assert data.batch_size == (2 if module is NYUv2DataModule else 8)
    assert data.augment
    assert len(data.layout.classes) == (13 if module is NYUv2DataModule else 7)


# ---------------------------------------------------------------------------------------------------- augmentation


def augmented_by_hand(array: np.ndarray, view: View, smooth: bool) -> np.ndarray:
    """Of an array (H, W, channels), written with indices."""
    height, width = array.shape[:2]
    rows, columns = int(height / view.scale), int(width / view.scale)
    part = array[view.top : view.top + rows, view.left : view.left + columns]
    assert part.shape[:2] == (rows, columns)
    if smooth:
        # Both ends of a pixel are where they are in the part.
        y = ((np.arange(height) + 0.5) * rows / height - 0.5).clip(0, rows - 1)
        x = ((np.arange(width) + 0.5) * columns / width - 0.5).clip(0, columns - 1)
        y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
        y1, x1 = np.minimum(y0 + 1, rows - 1), np.minimum(x0 + 1, columns - 1)
        v, u = (y - y0)[:, None, None], (x - x0)[None, :, None]
        upper, lower = ((1 - u) * part[r][:, x0] + u * part[r][:, x1] for r in (y0, y1))
        seen = (1 - v) * upper + v * lower
    else:
        seen = part[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    return seen[:, ::-1] if view.mirrored else seen


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("scale", "top", "left"), [(1.0, 0, 0), (1.2, 3, 0), (1.5, 11, 22)])
def test_augmentation_by_hand(scale: float, top: int, left: int, mirrored: bool):
    arrays = random_example(NYUV2, np.random.default_rng(0), 32, 64)
    example = {name: quantity.to_tensor(arrays[quantity.folder]) for name, quantity in NYUV2.files(NYUV2.tasks).items()}
    before = {name: values.clone() for name, values in example.items()}
    view = View(scale, top, left, mirrored)
    seen = augment(example, view)
    expected = {
        "image": augmented_by_hand(arrays["image"], view, smooth=True),
        "segmentation": augmented_by_hand(arrays["label"][..., None], view, smooth=False),
        "depth": augmented_by_hand(arrays["depth"], view, smooth=False) / scale,
        "normals": augmented_by_hand(arrays["normal"], view, smooth=False) * [-1 if mirrored else 1, 1, 1],
    }
    for name, values in seen.items():
        assert type(values) is Tensor
        assert values.dtype == example[name].dtype
        stacked = values.unsqueeze(0) if name == "segmentation" else values
        assert_close(stacked.movedim(0, -1).double().numpy(), expected[name].astype(float), rtol=1e-5, atol=1e-5)
        assert torch.equal(example[name], before[name])


def test_views_are_anywhere_in_the_image_and_of_every_kind():
    rng = np.random.default_rng(0)
    views = [View.draw(rng, 12, 20) for _ in range(1500)]
    share = sum(view.mirrored for view in views) / len(views)
    assert 0.45 < share < 0.55
    for scale, rows, columns in zip(SCALES, (12, 10, 8), (20, 16, 13), strict=True):
        some = [view for view in views if view.scale == scale]
        assert 0.28 < len(some) / len(views) < 0.39
        assert {view.top for view in some} == set(range(12 - rows + 1))
        assert {view.left for view in some} == set(range(20 - columns + 1))


def test_seed_epoch_and_example_alone_decide_what_is_seen(nyuv2: Path):
    def views(seed: int, number: int) -> list[bytes]:
        examples = DenseExamples(nyuv2 / "train", NYUV2, ("depth",), 7, seed)
        return [examples[epoch, number]["image"].numpy().tobytes() for epoch in range(8)]

    assert views(seed=0, number=1) == views(seed=0, number=1)
    assert len(set(views(seed=0, number=1))) > 3
    assert views(seed=0, number=1) != views(seed=1, number=1)


def test_validation_and_unaugmented_training_see_whole_images(nyuv2: Path):
    plain = DenseExamples(nyuv2 / "train", NYUV2, NYUV2.tasks, 7)
    data = ready(NYUv2DataModule, nyuv2, augment=False)
    batches = list(data.train_dataloader())
    order = [number for batch in BatchSampler(7, 2, shuffle_seed=0) for number in batch.tolist()]
    for name in ("image", "normals"):
        expected = torch.stack([plain[0, number][name] for number in order])
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected)


# ----------------------------------------------------------------------------------------------------------- order


def epochs(loader: ExampleLoader, number: int = 2) -> Iterator[list[dict[str, Tensor]]]:
    for epoch in range(number):
        loader.sampler.set_epoch(epoch)
        yield list(loader)


def assert_same_batches(first: Any, second: Any) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_workers_change_neither_the_batches_nor_any_global_random_number(nyuv2: Path):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    here, there = (
        epochs(ready(NYUv2DataModule, nyuv2, num_workers=number, seed=3).train_dataloader()) for number in (0, 2)
    )
    for one, other in zip(here, there, strict=True):
        assert len(one) == 3
        assert_same_batches(one, other)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_processes_share_the_examples_and_see_them_alike(nyuv2: Path):
    examples = DenseExamples(nyuv2 / "train", NYUV2, ("depth",), 6, augment_seed=0)
    shares = ((2, 0, 1), (1, 0, 2), (1, 1, 2))  # one process, and two with half a batch each
    loaders = [ExampleLoader(examples, BatchSampler(6, size, 0, rank, world)) for size, rank, world in shares]
    second_epochs = [list(epochs(loader))[1] for loader in loaders]
    whole, first, second = ([image for batch in epoch for image in batch["image"]] for epoch in second_epochs)
    assert len(whole) == 6
    for index, image in enumerate(whole):
        assert torch.equal(image, (first, second)[index % 2][index // 2])


class Recorder(L.LightningModule):
    """Remembers the pixels that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[bytes] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["image"].numpy().tobytes())
        return self.weight * 0.0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "limit"), [(0, 3), (1, 3), (1, 2)])
def test_a_resumed_run_sees_the_pixels_of_an_uninterrupted_one(nyuv2: Path, tmp_path: Path, workers: int, limit: int):
    def fit(checkpoint: str | None = None) -> list[bytes]:
        model = Recorder()
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        settings = {"max_epochs": 2, "limit_train_batches": limit, "enable_checkpointing": True}
        trainer = make_trainer(callbacks=[saving], **settings)
        trainer.fit(model, NYUv2DataModule(nyuv2, tasks=["depth"], num_workers=workers), ckpt_path=checkpoint)
        return model.seen

    whole = fit()
    assert len(set(whole)) == 2 * limit
    for step in (1, limit + 1):
        assert fit(str(tmp_path / f"step={step}.ckpt")) == whole[step:]
