"""What the text files of CelebA say, checked against each other and against the images that are there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipes.celeba.attributes import ATTRIBUTES
from recipes.celeba.layouts import Layout, find_layout

__all__ = ["SPLITS", "Listing", "read_listing"]

SPLITS: tuple[str, ...] = ("train", "val", "test")
"""Names of the splits 0, 1 and 2."""

_SIGNS = frozenset({"-1", "1"})
# Characters of a malformed line.
_SHOWN = 60


@dataclass(frozen=True)
class Listing:
    """All N images of the text files, in their order.

    Attributes:
        layout: Where they lie.
        names: File names.
        attributes: (N, 40), 1 where an image has the attribute, else 0; in the order of `ATTRIBUTES`.
        splits: (N,), 0 for training, 1 for validation, 2 for testing.
        sizes: (N,), sizes of the image files in bytes.
    """

    layout: Layout
    names: list[str]
    attributes: NDArray[np.uint8]
    splits: NDArray[np.uint8]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    @property
    def paths(self) -> list[Path]:
        """Files of the images."""
        return [self.layout.images / name for name in self.names]


def read_listing(root: str | Path) -> Listing:
    """Read the text files, and look for the images that they name; images that they do not name are left alone.

    Args:
        root: See `find_layout`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed, the two disagree, a split has no image, or an image is empty; the message
            names the file, and the line where there is one.
    """
    layout = find_layout(root)
    names, attributes = _read_attributes(layout.attributes)
    listed, splits = _read_partition(layout.partition)
    _check_equal(layout, names, listed)
    for split, name in enumerate(SPLITS):
        if not (splits == split).any():
            raise ValueError(f"{layout.partition} has no image of split {split} ({name}); it must have some of each.")
    return Listing(layout, names, attributes, splits, _sizes(layout, names))


def _read_attributes(path: Path) -> tuple[list[str], NDArray[np.uint8]]:
    lines = _lines(path)
    head = lines[:2] + [""] * (2 - len(lines))
    if not head[0].strip().isdecimal():
        raise ValueError(f"{path}, line 1: expected the number of images, got {_short(head[0])}.")
    header = head[1].split()
    if header != list(ATTRIBUTES):
        raise ValueError(f"{path}, line 2: {_header_error(header)}")
    if int(head[0]) != len(lines) - 2:
        raise ValueError(
            f"{path}, line 1: expected as many images as follow, which are {len(lines) - 2}, got {int(head[0])}. Is the"
            " file cut short?"
        )
    names, rows = [], []
    for number, line in enumerate(lines[2:], 3):
        name, *values = line.split() or [""]
        if len(values) != len(ATTRIBUTES):
            raise ValueError(
                f"{path}, line {number}: expected an image and {len(ATTRIBUTES)} attributes, got {len(values)} of them"
                f" in {_short(line)}."
            )
        if not _SIGNS.issuperset(values):
            attribute, value = next(pair for pair in zip(ATTRIBUTES, values, strict=True) if pair[1] not in _SIGNS)
            raise ValueError(f"{path}, line {number}: expected 1 or -1 for {attribute} of {name}, got {value!r}.")
        names.append(name)
        rows.append([value == "1" for value in values])
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        found = [number for number, name in enumerate(names, 3) if name == twice]
        raise ValueError(
            f"{path}, line {found[1]}: expected each image once, but {twice} is in line {found[0]} already."
        )
    return names, np.array(rows, np.uint8)


def _header_error(header: Sequence[str]) -> str:
    pairs = zip(header, ATTRIBUTES, strict=False)
    different = next((i for i, (found, wanted) in enumerate(pairs) if found != wanted), None)
    what = "expected the 40 attributes of CelebA in their order"
    if different is None:
        return f"{what}, got {len(header)} names."
    return f"{what}, got {header[different]!r} as number {different + 1} instead of {ATTRIBUTES[different]!r}."


def _read_partition(path: Path) -> tuple[list[str], NDArray[np.uint8]]:
    names, splits = [], []
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in {"0", "1", "2"}:
            raise ValueError(
                f"{path}, line {number}: expected an image and its split, 0 for training, 1 for validation or 2 for"
                f" testing, got {_short(line)}."
            )
        names.append(fields[0])
        splits.append(int(fields[1]))
    return names, np.array(splits, np.uint8)


def _check_equal(layout: Layout, names: Sequence[str], listed: Sequence[str]) -> None:
    if len(names) != len(listed):
        raise ValueError(
            f"{layout.attributes} lists {len(names)} images and {layout.partition} {len(listed)}; expected the same"
            " images in the same order."
        )
    for index, (name, other) in enumerate(zip(names, listed, strict=True)):
        if name != other:
            raise ValueError(
                f"{layout.partition}, line {index + 1}: expected {name}, which is in line {index + 3} of"
                f" {layout.attributes}, got {other}. Both must list the same images in the same order."
            )


def _sizes(layout: Layout, names: Sequence[str]) -> NDArray[np.int64]:
    with os.scandir(layout.images) as entries:
        there = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    if missing := [name for name in names if name not in there]:
        raise FileNotFoundError(
            f"{layout.images / missing[0]} is missing, and so are {len(missing) - 1} more of the {len(names)} images"
            f" that {layout.attributes} lists. Unpack img_align_celeba.zip again."
        )
    if empty := [name for name in names if there[name] == 0]:
        raise ValueError(
            f"{layout.images / empty[0]} is empty, and so are {len(empty) - 1} more images; expected JPEG files. Unpack"
            " img_align_celeba.zip again."
        )
    return np.array([there[name] for name in names], np.int64)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}.") from error


def _short(line: str) -> str:
    return repr(line if len(line) <= _SHOWN else f"{line[:_SHOWN]}...")
