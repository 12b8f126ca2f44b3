"""Random data in the layout of a dense benchmark, for tests that look at values rather than at scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from recipes.dense.data import DenseDataModule
from recipes.dense.layout import Layout


def random_example(layout: Layout, rng: np.random.Generator, height: int, width: int) -> dict[str, np.ndarray]:
    """Folder to array, with a tenth of each target unknown."""
    arrays = {
        "image": rng.random((height, width, 3)),
        layout.label_folder: rng.integers(0, len(layout.classes), (height, width)),
        "depth": rng.uniform(0.1, 1, (height, width, 1)) * layout.largest_depth,
    }
    arrays[layout.label_folder][rng.random((height, width)) < 0.1] = -1
    arrays["depth"][rng.random((height, width)) < 0.1] = 0
    if layout.has_normals:
        normals = rng.normal(size=(height, width, 3))
        arrays["normal"] = normals / np.linalg.norm(normals, axis=-1, keepdims=True)
        arrays["normal"][rng.random((height, width)) < 0.1] = 0
    return arrays


def write_random(
    root: Path,
    layout: Layout,
    num_train: int = 5,
    num_val: int = 3,
    height: int = 32,
    width: int = 64,
    dtype: DTypeLike = np.float32,
    label_dtype: DTypeLike = np.int64,
) -> Path:
    """Write both splits."""
    rng = np.random.default_rng(0)
    for split, size in {"train": num_train, "val": num_val}.items():
        for number in range(size):
            for folder, array in random_example(layout, rng, height, width).items():
                (root / split / folder).mkdir(parents=True, exist_ok=True)
                cast = array.astype(label_dtype if folder == layout.label_folder else dtype)
                np.save(root / split / folder / f"{number}.npy", cast)
    return root


def ready(module: type[DenseDataModule], root: Path, stage: str = "fit", **arguments: Any) -> DenseDataModule:
    """A data module that has looked at its files."""
    data = module(root, **arguments)
    data.setup(stage)
    return data
