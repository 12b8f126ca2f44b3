"""Checks of the files of a split, before training starts and whenever they are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from recipes.dense.layout import SIDE_FACTOR, Layout, Quantity

__all__ = ["check_files", "check_values", "read_checked"]

Array = NDArray[Any]

_NUMBERED = re.compile(r"(0|[1-9][0-9]*)\.npy")


def check_files(split: Path, layout: Layout, tasks: Sequence[str]) -> int:
    """Check the names of all files in the folder of a split, and the shapes and types in their headers.

    The values are not read. Only the images and the targets of the tasks are needed. Returns the number of examples.

    Raises:
        FileNotFoundError: If a folder or a file is missing.
        ValueError: If the folders have unequal numbers of files, a file has a wrong name, is cut short or has a wrong
            type or shape, or the networks cannot take images of this size.
    """
    quantities = layout.files(tasks).values()
    sizes = {quantity.folder: _count(split / quantity.folder, layout) for quantity in quantities}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name}/ has {size}" for name, size in sizes.items())
        raise ValueError(f"Every folder of {split} must have one file per example, but {counts}.")
    size = sizes[layout.image.folder]
    first = layout.image.path(split, 0)
    height, width = _header(first, layout.image).shape[:2]
    if height % SIDE_FACTOR or width % SIDE_FACTOR:
        raise ValueError(
            f"{first} has {height} rows and {width} columns, but must have multiples of {SIDE_FACTOR}, because the"
            " networks halve it five times. Resize or pad all arrays."
        )
    for quantity in quantities:
        for path in (quantity.path(split, number) for number in range(size)):
            shape = _header(path, quantity).shape
            if shape[:2] != (height, width):
                raise ValueError(
                    f"{path} has shape {shape}, but must have {height} rows and {width} columns, as {first} has."
                )
    return size


def check_values(split: Path, layout: Layout, tasks: Sequence[str], size: int, console: Console) -> None:
    """Read all files and check their values, with a progress bar; see `check_files` and `read_checked`."""
    quantities = layout.files(tasks).values()
    for number in track(range(size), f"checking {split}", console=console, transient=True):
        for quantity in quantities:
            read_checked(quantity.path(split, number), quantity)


def read_checked(path: Path, quantity: Quantity) -> Array:
    """Read a file.

    Raises:
        ValueError: If the array has values that it must not have. The message names the file.
    """
    # Mapping the file into memory was measured to be no faster, because all of it is read.
    array = np.load(path)
    fault = quantity.find_fault(array)
    if fault is not None:
        raise ValueError(f"{path} {fault}, but must hold {quantity.values}.")
    return array


def _count(folder: Path, layout: Layout) -> int:
    """Count the files of a folder, which must be numbered from 0."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. {layout.tree}")
    # Some systems leave hidden files behind.
    names = {path.name for path in folder.iterdir() if path.suffix == ".npy" and not path.name.startswith(".")}
    if strange := sorted(name for name in names if not _NUMBERED.fullmatch(name)):
        raise ValueError(
            f"{folder / strange[0]} must be named after its number, such as 0.npy or 12.npy. Rename or delete it."
        )
    for number in range(max(1, len(names))):
        if f"{number}.npy" not in names:
            raise FileNotFoundError(
                f"There is no {folder / f'{number}.npy'}, but there are {len(names)} files in that folder. They must be"
                " numbered from 0 without a gap."
            )
    return len(names)


def _header(path: Path, quantity: Quantity) -> Array:
    """Map the array of a file into memory without reading its values."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is not a complete .npy file of numbers: {error}. Copy or download it again."
        ) from error
    kinds, names = ("iuf", "numbers") if quantity.is_labels else ("f", "floating point numbers")
    if array.dtype.kind not in kinds:
        raise ValueError(f"{path} has dtype {array.dtype}, but must hold {names}: {quantity.values}.")
    if array.ndim < 2 or array.size == 0 or array.shape[2:] not in quantity.shapes:
        allowed = " or ".join(str(("H", "W", *rest)).replace("'", "") for rest in quantity.shapes)
        raise ValueError(f"{path} has shape {array.shape}, but must have shape {allowed}.")
    return array
