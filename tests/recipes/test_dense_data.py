"""Data of dense benchmarks: what is on disk is what is served, augmentation by hand, and all that may be wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
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
from tests.helpers import make_trainer
from tests.recipes.dense_files import random_example, write_random

MODULES = {"nyuv2": NYUv2DataModule, "cityscapes": CityScapesDataModule}
both = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


@pytest.fixture(scope="module")
def nyuv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("nyuv2"), NYUV2, num_train=7)


def ready(module: type[DenseDataModule], root: Path, stage: str = "fit", **arguments: Any) -> DenseDataModule:
    data = module(root, **arguments)
    data.setup(stage)
    return data


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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_sees_the_pixels_of_an_uninterrupted_one(nyuv2: Path, tmp_path: Path, workers: int):
    def fit(checkpoint: str | None = None) -> list[bytes]:
        model = Recorder()
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(max_epochs=2, callbacks=[saving], enable_checkpointing=True)
        trainer.fit(model, NYUv2DataModule(nyuv2, tasks=["depth"], num_workers=workers), ckpt_path=checkpoint)
        return model.seen

    whole = fit()
    assert len(set(whole)) == 6
    for step in (2, 4):
        assert fit(str(tmp_path / f"step={step}.ckpt")) == whole[step:]


# -------------------------------------------------------------------------------------------------------- bad data


def change(path: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Write another array in the place of one."""
    return lambda root: np.save(root / path, edit(np.load(root / path)))


def put(value: float, where: Any = (0, 0)) -> Callable[[np.ndarray], np.ndarray]:
    """Another value in one place."""

    def edit(array: np.ndarray) -> np.ndarray:
        array[where] = value
        return array

    return edit


def cut(path: str, size: int) -> Callable[[Path], None]:
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:size])


def remove(path: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        if (root / path).is_dir():
            (root / path).rename(root / "away")
        else:
            (root / path).unlink()

    return edit


FAULTY_FILES = {
    "no train split": (remove("train"), r"no folder .*train/image\. NYUv2 has the folders\n  train/image/0.npy"),
    "no val split": (remove("val"), r"no folder .*val/image"),
    "no folder": (remove("train/depth"), r"no folder .*train/depth"),
    "a gap": (remove("train/label/1.npy"), r"no .*train/label/1\.npy, but there are 2 files"),
    "a missing file": (
        remove("train/normal/2.npy"),
        r"train must have one file .* image/ has 3, .* normal/ has 2",
    ),
    "a strange name": (lambda root: (root / "val/depth/01.npy").touch(), r"val/depth/01\.npy must be named after"),
    "a truncated array": (cut("train/image/1.npy", 9000), r"train/image/1\.npy is no complete \.npy file"),
    "a truncated header": (cut("val/depth/0.npy", 20), r"val/depth/0\.npy is no complete \.npy file"),
    "an empty file": (cut("val/depth/0.npy", 0), r"val/depth/0\.npy is no complete \.npy file"),
    "another format": (
        lambda root: (root / "val/label/0.npy").write_bytes(b"PNG" * 50),
        r"label/0\.npy is no complete",
    ),
    "bytes": (change("val/image/0.npy", lambda a: (255 * a).astype("u1")), r"image/0\.npy has dtype uint8, but must"),
    "objects": (change("val/label/0.npy", lambda a: a.astype(object)), r"label/0\.npy is no complete .* numbers"),
    "channels first": (change("val/normal/0.npy", lambda a: a.transpose(2, 0, 1)), r"\(3, 32, 64\), .* \(H, W, 3\)"),
    "two depths": (change("train/depth/0.npy", lambda a: a.repeat(2, 2)), r"shape \(H, W, 1\) or \(H, W\)"),
    "one-hot labels": (change("train/label/0.npy", lambda a: np.eye(13)[a]), r"label/0\.npy has shape .* \(H, W\)\."),
    "another size": (change("train/depth/2.npy", lambda a: a[1:]), r"depth/2\.npy .*\(31, 64, 1\), .* 32 rows and 64"),
}
FAULTY_VALUES = {
    "a label too large": (change("train/label/1.npy", put(13)), r"train/label/1\.npy has labels from -1 to 13, but"),
    "another void": (change("val/label/0.npy", put(-2)), r"val/label/0\.npy has labels from -2 to 12, but .* 0 to 12"),
    "half a label": (change("val/label/0.npy", lambda a: a + 0.5 * (a == 3)), r"between whole numbers, such as 3.5"),
    "labels that are no numbers": (change("val/label/0.npy", lambda a: a + np.nan), r"has labels from nan to nan"),
    "no depth": (change("train/depth/2.npy", put(np.nan)), r"train/depth/2\.npy has 1 values that are not finite"),
    "negative depth": (change("train/depth/2.npy", put(-1)), r"depth/2\.npy has 1 negative values, down to -1, but"),
    "millimetres": (change("val/depth/0.npy", lambda a: a * 1000), r"val/depth/0\.npy has values up to .* in metres"),
    "colours to 255": (
        change("val/image/0.npy", lambda a: a * 255),
        r"image/0\.npy has values from .* hold red",
    ),
    "colours that are no numbers": (change("val/image/0.npy", put(np.nan)), r"image/0\.npy has values from nan to nan"),
    "long normals": (change("val/normal/0.npy", lambda a: a + 0.5), r"normal/0\.npy has vectors up to length"),
    "infinite normals": (change("val/normal/0.npy", put(np.inf)), r"normal/0\.npy has values that are not finite"),
}


def broken(edit: Callable[[Path], None], tmp_path: Path) -> Path:
    write_random(tmp_path, NYUV2, 3, 1)
    edit(tmp_path)
    return tmp_path


@pytest.mark.parametrize("check", ["files", "full"])
@pytest.mark.parametrize("fault", FAULTY_FILES)
def test_faulty_files_are_refused_before_training(fault: str, check: str, tmp_path: Path):
    edit, message = FAULTY_FILES[fault]
    data = NYUv2DataModule(broken(edit, tmp_path), check=check)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.setup("fit")


@pytest.mark.parametrize("fault", FAULTY_VALUES)
def test_faulty_values_are_refused_before_training_or_when_they_are_read(fault: str, tmp_path: Path):
    edit, message = FAULTY_VALUES[fault]
    root = broken(edit, tmp_path)
    with pytest.raises(ValueError, match=message):
        NYUv2DataModule(root, check="full").setup("fit")
    data = ready(NYUv2DataModule, root, batch_size=1)
    with pytest.raises(ValueError, match=message):
        list(data.train_dataloader()), list(data.val_dataloader())


def test_the_other_split_is_not_needed_to_validate(tmp_path: Path):
    root = broken(remove("train"), tmp_path)
    assert len(ready(NYUv2DataModule, root, "validate", check="full").val_dataloader()) == 1


def test_a_check_of_good_data_finds_nothing_and_ignores_hidden_files(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_random(tmp_path, CITYSCAPES, 2, 1)
    (tmp_path / "train" / "image" / "._0.npy").touch()
    (tmp_path / "train" / "readme.txt").touch()
    assert ready(CityScapesDataModule, tmp_path, check="full").sizes == {"train": 2, "val": 1}
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"check": "some"}, "check='some' must be one of"),
        ({"tasks": []}, r"tasks=\[\] must name one or more of"),
        ({"tasks": ["depth", "depth"]}, "each once"),
        ({"tasks": ["normal"]}, "must name one or more of .*'normals'"),
        ({"tasks": "depth"}, "tasks='depth' must name"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        NYUv2DataModule("somewhere", **arguments)


def test_a_missing_root_is_named_with_what_it_must_hold(tmp_path: Path):
    root = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=re.escape(f"root={str(root)!r} must be a folder") + r"[\s\S]*label_7"):
        ready(CityScapesDataModule, root)


def test_too_few_examples_for_a_batch_are_an_error(nyuv2: Path):
    with pytest.raises(ValueError, match=r"batch_size=8 leaves no batch: .* has 7 of 7 examples"):
        ready(NYUv2DataModule, nyuv2, batch_size=8).train_dataloader()
