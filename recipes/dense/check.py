"""Whether the files of a split are all there and hold what they must, before training starts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from recipes.dense.layout import SIDE_FACTOR, Layout
from recipes.dense.quantities import Quantity

__all__ = ["check_all_values", "check_files", "checked_values"]

Array = NDArray[Any]

_NUMBERED = re.compile(r"(0|[1-9][0-9]*)\.npy")


def check_files(folder: Path, layout: Layout, tasks: Iterable[str]) -> int:
    """Look at the names of all files and at the shapes and types in their headers, and read none of them.

    Args:
        folder: Folder of a split.
        layout: The benchmark.
        tasks: Tasks whose targets are needed.

    Returns:
        Number of examples.

    Raises:
        FileNotFoundError: If a folder or a file is missing.
        ValueError: If there are unequal numbers of files, files with other names, or an array that is cut short, has
            the wrong type, or another shape than the first image, or if that has sides of another length than networks
            can take.
    """
    quantities = layout.files(tuple(tasks)).values()
    sizes = {quantity.folder: _count(folder / quantity.folder, layout) for quantity in quantities}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name}/ has {size}" for name, size in sizes.items())
        raise ValueError(f"The folders of {folder} must have one file an example each, but {counts}.")
    size = sizes[layout.image.folder]
    first = folder / layout.image.folder / "0.npy"
    height, width = _header(first, layout.image).shape[:2]
    if height % SIDE_FACTOR or width % SIDE_FACTOR:
        raise ValueError(
            f"{first} has {height} rows and {width} columns, but must have multiples of {SIDE_FACTOR}, because networks"
            " halve it five times. Resize or pad all arrays."
        )
    for quantity in quantities:
        for number in range(size):
            path = folder / quantity.folder / f"{number}.npy"
            shape = _header(path, quantity).shape
            if shape[:2] != (height, width):
                raise ValueError(
                    f"{path} has shape {shape}, but must have {height} rows and {width} columns, as {first} has."
                )
    return size


def check_all_values(folder: Path, layout: Layout, tasks: Iterable[str], size: int, console: Console) -> None:
    """Read all files, and look at their values.

    Args:
        folder: See `check_files`, as the others.
        layout: See there.
        tasks: See there.
        size: Number of examples.
        console: Where to show a progress bar.

    Raises:
        ValueError: If an array has values that it must not have.
    """
    quantities = layout.files(tuple(tasks)).values()
    for number in track(range(size), f"checking {folder}", console=console, transient=True):
        for quantity in quantities:
            path = folder / quantity.folder / f"{number}.npy"
            checked_values(np.load(path), path, quantity)


def checked_values(array: Array, path: Path, quantity: Quantity) -> Array:
    """The array itself.

    Raises:
        ValueError: If it has values that it must not have.
    """
    fault = quantity.fault(array)
    if fault is not None:
        raise ValueError(f"{path} {fault}, but must hold {quantity.values}.")
    return array


def _count(folder: Path, layout: Layout) -> int:
    """How many files a folder has, which must be numbered from 0."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. {layout.tree}")
    # Some systems leave hidden files behind.
    names = {path.name for path in folder.iterdir() if path.suffix == ".npy" and not path.name.startswith(".")}
    strange = sorted(name for name in names if not _NUMBERED.fullmatch(name))
    if strange:
        raise ValueError(f"{folder / strange[0]} must be named after its number, such as 0.npy or 12.npy, or go.")
    for number in range(max(1, len(names))):
        if f"{number}.npy" not in names:
            raise FileNotFoundError(
                f"There is no {folder / f'{number}.npy'}, but there are {len(names)} files in that folder: they must be"
                " numbered from 0 without a gap."
            )
    return len(names)


def _header(path: Path, quantity: Quantity) -> Array:
    """The array of a file, mapped and not read."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no complete .npy file of numbers: {error}. Copy or download it again.") from error
    if array.dtype.kind not in quantity.dtype_kinds:
        raise ValueError(f"{path} has dtype {array.dtype}, but must hold {quantity.dtype_names}: {quantity.values}.")
    if array.ndim < 2 or array.size == 0 or array.shape[2:] not in quantity.shapes:
        allowed = " or ".join(str(("H", "W", *rest)).replace("'", "") for rest in quantity.shapes)
        raise ValueError(f"{path} has shape {array.shape}, but must have shape {allowed}.")
    return array
