"""The files of CelebA: where they are, and what the text files say about the images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipes.celeba.attributes import ATTRIBUTES

__all__ = ["SPLITS", "Layout", "Listing", "read_listing"]

SPLITS: tuple[str, ...] = ("train", "val", "test")
"""Names of the splits 0, 1 and 2."""

# Folders of the images, the attributes and the splits.
_FOLDERS = {"the authors' layout": ("Img", "Anno", "Eval"), "torchvision's layout": ("celeba", "celeba", "celeba")}
_SIGNS = frozenset({"-1", "1"})
# Number of characters that a message shows of a malformed line.
_SHOWN = 60


@dataclass(frozen=True)
class Layout:
    """Paths of what the recipe reads.

    Attributes:
        images: Folder of the aligned and cropped images.
        attributes: Text file of the attributes.
        partition: Text file that assigns the images to splits.
    """

    images: Path
    attributes: Path
    partition: Path

    @property
    def missing(self) -> list[Path]:
        """The paths that do not exist."""
        files = [path for path in (self.attributes, self.partition) if not path.is_file()]
        return files if self.images.is_dir() else [self.images, *files]


@dataclass(frozen=True)
class Listing:
    """All N images of the text files, in their order.

    Attributes:
        layout: Where the files are.
        names: File names.
        attributes: 1 where an image has the attribute, else 0; (N, 40) in the order of `ATTRIBUTES`.
        splits: 0 for training, 1 for validation, 2 for testing; (N,).
        sizes: Sizes of the image files in bytes, (N,).
    """

    layout: Layout
    names: list[str]
    attributes: NDArray[np.uint8]
    splits: NDArray[np.uint8]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)


def read_listing(root: str | Path) -> Listing:
    """Read the text files and look for the images that they name. Other images are ignored.

    Args:
        root: Folder that contains `Img`, `Anno` and `Eval` (the authors' layout) or `celeba` (torchvision's).

    Raises:
        FileNotFoundError: If a folder or a file is missing.
        ValueError: If both layouts are there, a file is malformed, the two files disagree, a split has no image, or an
            image is empty. The message names the file, and the line where there is one.
    """
    layout = _find_layout(Path(root))
    names, attributes = _read_attributes(layout.attributes)
    listed, splits = _read_partition(layout.partition)
    _check_equal(layout, names, listed)
    for split, name in enumerate(SPLITS):
        if not (splits == split).any():
            raise ValueError(f"{layout.partition} has no image of split {split} ({name}), but every split needs some.")
    return Listing(layout, names, attributes, splits, _sizes(layout, names))


def _find_layout(root: Path) -> Layout:
    if not root.is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is not a folder. Give the folder with the files of CelebA.")
    layouts = {
        name: Layout(
            root / images / "img_align_celeba",
            root / anno / "list_attr_celeba.txt",
            root / ev / "list_eval_partition.txt",
        )
        for name, (images, anno, ev) in _FOLDERS.items()
    }
    complete = [layout for layout in layouts.values() if not layout.missing]
    if len(complete) > 1:
        raise ValueError(
            f"root={str(root)!r} has CelebA twice, in {' and '.join(layouts)}. Move one of them elsewhere, so"
            " that it is clear which one to read."
        )
    if complete:
        return complete[0]
    missing = "; ".join(f"{name} lacks {', '.join(map(str, layout.missing))}" for name, layout in layouts.items())
    raise FileNotFoundError(
        f"root={str(root)!r} has CelebA in neither layout: {missing}. The images come in img_align_celeba.zip, which"
        " must be unpacked. Nothing is downloaded."
    )


def _read_attributes(path: Path) -> tuple[list[str], NDArray[np.uint8]]:
    lines = _lines(path)
    head = lines[:2] + [""] * (2 - len(lines))
    if not head[0].strip().isdecimal():
        raise ValueError(f"{path}, line 1: expected the number of images, got {_short(head[0])}.")
    header = head[1].split()
    if header != list(ATTRIBUTES):
        raise ValueError(
            f"{path}, line 2: expected the 40 attributes of CelebA in their order, got {_difference(header)}."
        )
    if int(head[0]) != len(lines) - 2:
        raise ValueError(
            f"{path}, line 1: expected {len(lines) - 2}, as many images follow, got {int(head[0])}. Is the file cut"
            " short?"
        )
    names, rows = [], []
    for number, line in enumerate(lines[2:], 3):
        name, *values = line.split() or [""]
        if len(values) != len(ATTRIBUTES):
            raise ValueError(
                f"{path}, line {number}: expected an image and {len(ATTRIBUTES)} attributes, got {len(values)}"
                f" attributes in {_short(line)}."
            )
        if not _SIGNS.issuperset(values):
            attribute, value = next(pair for pair in zip(ATTRIBUTES, values, strict=True) if pair[1] not in _SIGNS)
            raise ValueError(f"{path}, line {number}: expected 1 or -1 for {attribute} of {name}, got {value!r}.")
        names.append(name)
        rows.append([value == "1" for value in values])
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        first, second, *_ = (number for number, name in enumerate(names, 3) if name == twice)
        raise ValueError(f"{path}, line {second}: expected each image once, but {twice} is in line {first} already.")
    return names, np.array(rows, np.uint8)


def _difference(header: Sequence[str]) -> str:
    for number, (found, expected) in enumerate(zip(header, ATTRIBUTES, strict=False), 1):
        if found != expected:
            return f"{found!r} as number {number} instead of {expected!r}"
    return f"{len(header)} names"


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
    both = "Both files must list the same images in the same order."
    if len(names) != len(listed):
        raise ValueError(f"{layout.attributes} lists {len(names)} images and {layout.partition} {len(listed)}. {both}")
    for index, (name, other) in enumerate(zip(names, listed, strict=True)):
        if name != other:
            raise ValueError(
                f"{layout.partition}, line {index + 1}: expected {name}, which is in line {index + 3} of"
                f" {layout.attributes}, got {other}. {both}"
            )


def _sizes(layout: Layout, names: Sequence[str]) -> NDArray[np.int64]:
    with os.scandir(layout.images) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    again = "Unpack img_align_celeba.zip again."
    if missing := [name for name in names if name not in sizes]:
        raise FileNotFoundError(
            f"{layout.images / missing[0]} is missing, and so are {len(missing) - 1} more of the {len(names)} images"
            f" that {layout.attributes} lists. {again}"
        )
    if empty := [name for name in names if sizes[name] == 0]:
        raise ValueError(f"{layout.images / empty[0]} is empty, and so are {len(empty) - 1} more images. {again}")
    return np.array([sizes[name] for name in names], np.int64)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}.") from error


def _short(line: str) -> str:
    return repr(line if len(line) <= _SHOWN else f"{line[:_SHOWN]}...")
