"""All that may be wrong with the files of a dense benchmark is found before training, and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.cityscapes import CITYSCAPES, CityScapesDataModule
from recipes.nyuv2 import NYUV2, NYUv2DataModule
from tests.support.dense_files import ready, write_random


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
    "a truncated array": (cut("train/image/1.npy", 9000), r"train/image/1\.npy is not a complete \.npy file"),
    "a truncated header": (cut("val/depth/0.npy", 20), r"val/depth/0\.npy is not a complete \.npy file"),
    "an empty file": (cut("val/depth/0.npy", 0), r"val/depth/0\.npy is not a complete \.npy file"),
    "another format": (
        lambda root: (root / "val/label/0.npy").write_bytes(b"PNG" * 50),
        r"label/0\.npy is not a complete",
    ),
    "bytes": (change("val/image/0.npy", lambda a: (255 * a).astype("u1")), r"image/0\.npy has dtype uint8, but must"),
    "objects": (change("val/label/0.npy", lambda a: a.astype(object)), r"label/0\.npy is not a complete .* numbers"),
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
    "millimetres": (change("val/depth/0.npy", lambda a: a * 1000), r"val/depth/0\.npy has values up to .* in meters"),
    "colors to 255": (
        change("val/image/0.npy", lambda a: a * 255),
        r"image/0\.npy has values from .* hold red",
    ),
    "colors that are no numbers": (change("val/image/0.npy", put(np.nan)), r"image/0\.npy has values from nan to nan"),
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


@pytest.mark.parametrize("size", [(48, 64), (64, 48)])
def test_sizes_that_no_network_takes_are_refused_before_training(size: tuple[int, int], tmp_path: Path):
    write_random(tmp_path, NYUV2, 1, 1, *size)
    with pytest.raises(ValueError, match=rf"image/0\.npy has {size[0]} rows and {size[1]} columns, .* multiples of 32"):
        NYUv2DataModule(tmp_path).setup("fit")


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


def test_too_few_examples_for_a_batch_are_an_error(tmp_path: Path):
    data = ready(CityScapesDataModule, write_random(tmp_path, CITYSCAPES, 7, 1))
    with pytest.raises(ValueError, match=r"batch_size=8 leaves no batch: .* has 7 of 7 examples"):
        data.train_dataloader()
