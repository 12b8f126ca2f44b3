"""Data sets on disk: the scenes of NYUv2's and CityScapes' layouts, and the faces of CelebA's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from recipes.common.files import replacing
from recipes.common.progress import run_with_progress
from recipes.scenes.celeba import TEXT_FOLDERS, celeba_texts, image_name
from recipes.scenes.examples import Split, make_face, make_room, make_street, paint
from recipes.scenes.storage import claim_folder

__all__ = ["write_celeba", "write_cityscapes", "write_nyuv2"]

Example = Callable[[int, Split, int, int, int], dict[str, np.ndarray]]
# To be raised when the same seed gives other files: a folder that was begun before must not be finished after.
_VERSION = 1
_ABOUT = "Drawn by python -m recipes.scenes: no photographs, no benchmark."
_AT_ONCE = 20
_LEAST_SIDE = 16


def write_nyuv2(
    folder: str | Path,
    num_train: int,
    num_val: int,
    height: int = 96,
    width: int = 128,
    seed: int = 0,
    *,
    jobs: int = 1,
    console: Console | None = None,
) -> Path:
    """Write furnished rooms in NYUv2's layout: `{train,val}/{image,label,depth,normal}/{i}.npy`.

    An example is a function of `seed`, its split and number, and the size, whatever the number of jobs or of examples.
    A call that was cut short is finished by the same call; files that are there are kept.

    Args:
        folder: New, empty, or begun by a call with the same arguments.
        num_train: Number of training examples.
        num_val: Number of validation examples.
        height: Rows of the images.
        width: Columns of the images.
        seed: Decides all examples.
        jobs: Processes at work; 1 without a console: this one.
        console: Where to show progress; None: nowhere.

    Returns:
        The folder.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If the folder holds something else.
    """
    files = ("image", "label", "depth", "normal")
    scenes = _Scenes("nyuv2", make_room, Path(folder), files, seed, height, width)
    return scenes.write({Split.TRAIN: num_train, Split.VAL: num_val}, jobs, console)


def write_cityscapes(
    folder: str | Path,
    num_train: int,
    num_val: int,
    height: int = 96,
    width: int = 192,
    seed: int = 0,
    *,
    jobs: int = 1,
    console: Console | None = None,
) -> Path:
    """Write streets in CityScapes' layout: `{train,val}/{image,label_7,depth}/{i}.npy`.

    Args:
        folder: See `write_nyuv2`, as the others, what is returned and what is raised.
        num_train: See there.
        num_val: See there.
        height: See there.
        width: See there.
        seed: See there.
        jobs: See there.
        console: See there.
    """
    scenes = _Scenes("cityscapes", make_street, Path(folder), ("image", "label_7", "depth"), seed, height, width)
    return scenes.write({Split.TRAIN: num_train, Split.VAL: num_val}, jobs, console)


def write_celeba(
    folder: str | Path,
    num_train: int,
    num_val: int,
    num_test: int,
    seed: int = 0,
    torchvision_layout: bool = False,
    *,
    jobs: int = 1,
    console: Console | None = None,
) -> Path:
    """Write drawn faces in CelebA's layout, the authors' or torchvision's.

    Args:
        folder: See `write_nyuv2`, as the others, what is returned and what is raised.
        num_train: See there.
        num_val: See there.
        num_test: Number of test examples.
        seed: See there.
        torchvision_layout: Whether all files go to `celeba/`, as `torchvision.datasets.CelebA` wants it, rather than to
            `Img/img_align_celeba/`, `Anno/` and `Eval/`.
        jobs: See there.
        console: See there.
    """
    folder, sizes = Path(folder), {"num_train": num_train, "num_val": num_val, "num_test": num_test}
    _check(sizes | {"jobs": jobs}, least=1)
    _check({"seed": seed}, least=0)
    layout = "torchvision" if torchvision_layout else "authors"
    claim_folder(folder, _settings("celeba", seed=seed, files=layout, **sizes))

    images = folder / ("celeba" if torchvision_layout else "Img") / "img_align_celeba"
    images.mkdir(parents=True, exist_ok=True)
    missing = [index for index in range(sum(sizes.values())) if not (images / image_name(index)).is_file()]
    _run(partial(_write_faces, images, seed), {"faces": missing}, jobs, console)
    # Last: a folder that lacks images lacks these too, and is no data set yet.
    texts = celeba_texts([make_face(seed, index) for index in range(sum(sizes.values()))], list(sizes.values()))
    for name, text in texts.items():
        path = folder / ("celeba" if torchvision_layout else TEXT_FOLDERS[name]) / name
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as unfinished:
            unfinished.write_bytes(text.encode())
    return folder


def _settings(layout: str, **settings: str | int) -> dict[str, str | int]:
    return {"about": _ABOUT, "version": _VERSION, "layout": layout, **settings}


def _check(numbers: Mapping[str, int], least: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name}={number} must be at least {least}.")


@dataclass(frozen=True)
class _Scenes:
    """A data set of scenes; what a worker process is told."""

    layout: str
    example: Example
    folder: Path
    files: tuple[str, ...]
    seed: int
    height: int
    width: int

    def write(self, sizes: Mapping[Split, int], jobs: int, console: Console | None) -> Path:
        named = {f"num_{split.name.lower()}": size for split, size in sizes.items()}
        _check(named | {"jobs": jobs}, least=1)
        _check({"height": self.height, "width": self.width}, least=_LEAST_SIDE)
        _check({"seed": self.seed}, least=0)
        settings = {"seed": self.seed, "height": self.height, "width": self.width}
        claim_folder(self.folder, _settings(self.layout, **settings, **named))
        missing = {}
        for split, size in sizes.items():
            for path in self._paths(split, 0).values():
                path.parent.mkdir(parents=True, exist_ok=True)
            complete = (all(path.is_file() for path in self._paths(split, index).values()) for index in range(size))
            missing[split.name.lower()] = [index for index, is_complete in enumerate(complete) if not is_complete]
        _run(self._write_some, missing, jobs, console)
        return self.folder

    def _paths(self, split: Split, index: int) -> dict[str, Path]:
        return {name: self.folder / split.name.lower() / name / f"{index}.npy" for name in self.files}

    def _write_some(self, chunk: tuple[str, Sequence[int]]) -> None:
        split = Split[chunk[0].upper()]
        for index in chunk[1]:
            arrays = self.example(self.seed, split, index, self.height, self.width)
            for name, path in self._paths(split, index).items():
                with replacing(path) as unfinished, unfinished.open("wb") as file:
                    np.save(file, np.ascontiguousarray(arrays[name]))


def _write_faces(images: Path, seed: int, chunk: tuple[str, Sequence[int]]) -> None:
    for index in chunk[1]:
        with replacing(images / image_name(index)) as unfinished:
            paint(seed, index).save(unfinished, format="JPEG", quality=92)


def _run(
    write: Callable[[tuple[str, Sequence[int]]], None],
    missing: Mapping[str, Sequence[int]],
    jobs: int,
    console: Console | None,
) -> None:
    """Write the examples that are missing, some at a time."""
    chunks = {
        f"{what} {some[0]} to {some[-1]}": (what, some)
        for what, indices in missing.items()
        for some in (indices[first : first + _AT_ONCE] for first in range(0, len(indices), _AT_ONCE))
    }
    if not chunks:
        return
    if jobs == 1 and console is None:
        with _one_thread():
            for chunk in chunks.values():
                write(chunk)
    else:
        quiet = Console(quiet=True)
        for _ in run_with_progress(write, chunks, jobs, _use_one_thread, console or quiet, "starting"):
            pass


def _use_one_thread() -> None:
    # Processes are the parallelism; and how elements are dealt out to threads may show in the last bit of a result.
    torch.set_num_threads(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    _use_one_thread()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
