"""Data sets on disk. A writer that was cut short goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from recipes.common.files import replacing
from recipes.common.progress import run_with_progress
from recipes.scenes.faces import ATTRIBUTES, BOUNDS, LANDMARKS, draw_attributes, paint_face
from recipes.scenes.rooms import make_room
from recipes.scenes.streets import make_street

__all__ = ["write_celeba", "write_cityscapes", "write_nyuv2"]

# Raise it when the same seed gives other files: a folder that was begun before must not be finished after.
_VERSION = 2
_LEAST = {"seed": 0, "height": 16, "width": 16, "torchvision_layout": False}
_FILES = {"nyuv2": ("image", "label", "depth", "normal"), "cityscapes": ("image", "label_7", "depth")}
_FACES = len(_FILES)
_image_name = "{:06d}.jpg".format
_SIDES = "x_1 y_1 width height"
_POINTS = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y"


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

    An example depends on `seed`, its split, its number and the size of the images alone. If a call was cut short, the
    same call goes on from there.

    Args:
        folder: New, empty, or begun by a call with the same arguments.
        num_train: Number of training examples.
        num_val: Number of validation examples.
        height: Rows of the images.
        width: Columns of the images.
        seed: Decides all examples.
        jobs: Number of processes. With 1 and without a console, this process does the work.
        console: Where to show progress; None: nowhere.

    Returns:
        The folder.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If the folder holds something else.
    """
    numbers = {"num_train": num_train, "num_val": num_val, "height": height, "width": width, "seed": seed}
    return _write_arrays("nyuv2", Path(folder), numbers, jobs, console)


def write_cityscapes(
    folder: str | Path, num_train: int, num_val: int, height: int = 96, width: int = 192, seed: int = 0, **work: Any
) -> Path:
    """Write streets in CityScapes' layout, `{train,val}/{image,label_7,depth}/{i}.npy`; see `write_nyuv2`."""
    numbers = {"num_train": num_train, "num_val": num_val, "height": height, "width": width, "seed": seed}
    return _write_arrays("cityscapes", Path(folder), numbers, **work)


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
    """Write drawn faces in CelebA's layout; see `write_nyuv2`.

    The images are in `Img/img_align_celeba/`, the text files in `Anno/` and `Eval/`, as the authors publish them. With
    `torchvision_layout`, all are in `celeba/`, where `torchvision.datasets.CelebA` looks for them.
    """
    folder, sizes = Path(folder), (num_train, num_val, num_test)
    numbers = {"num_train": num_train, "num_val": num_val, "num_test": num_test, "seed": seed}
    _begin(folder, "celeba", {**numbers, "torchvision_layout": torchvision_layout}, jobs)
    images = folder / ("celeba" if torchvision_layout else "Img") / "img_align_celeba"
    images.mkdir(parents=True, exist_ok=True)
    missing = {name: index for index in range(sum(sizes)) if not (images / (name := _image_name(index + 1))).is_file()}
    _run(partial(_write_face, images, seed), missing, jobs, console)
    # Last: a folder that lacks images lacks these too, and is no data set yet.
    faces = [draw_attributes(np.random.default_rng((_FACES, seed, index))) for index in range(sum(sizes))]
    for name, text in _texts(faces, sizes).items():
        path = folder / ("celeba/" + Path(name).name if torchvision_layout else name)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as unfinished:
            unfinished.write_bytes(text.encode())
    return folder


def _begin(folder: Path, layout: str, numbers: Mapping[str, int], jobs: int) -> None:
    """Make the folder, or make sure that it was begun with the same settings."""
    for name, number in {**numbers, "jobs": jobs}.items():
        if number < (least := _LEAST.get(name, 1)):
            raise ValueError(f"{name}={number} must be at least {least}.")
    about = "Drawn by python -m recipes.scenes: no photographs, no benchmark."
    settings = {"about": about, "version": _VERSION, "layout": layout, **numbers}
    path = folder / "scenes.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
        if names:
            differences = ", ".join(f"{name}={found.get(name)!r} there, {settings.get(name)!r} now" for name in names)
            raise FileExistsError(
                f"folder={str(folder)!r} holds scenes of other settings ({differences}): choose another, or delete it."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"folder={str(folder)!r} must be empty, new, or begun by this command, which leaves scenes.json in it."
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _run(write: Callable[[Any], None], missing: Mapping[str, Any], jobs: int, console: Console | None) -> None:
    if jobs == 1 and console is None:
        for item in missing.values():
            write(item)
    elif missing:
        for _ in run_with_progress(write, missing, jobs, _no_preparation, console or Console(quiet=True), "starting"):
            pass


def _no_preparation() -> None:
    pass


def _write_arrays(
    layout: str, folder: Path, numbers: Mapping[str, int], jobs: int = 1, console: Console | None = None
) -> Path:
    _begin(folder, layout, numbers, jobs)
    missing = {
        f"{split} {index}": (split, index)
        for split in ("train", "val")
        for index in range(numbers[f"num_{split}"])
        if not all((folder / split / name / f"{index}.npy").is_file() for name in _FILES[layout])
    }
    write = partial(_write_example, layout, folder, numbers["seed"], (numbers["height"], numbers["width"]))
    _run(write, missing, jobs, console)
    return folder


def _write_example(layout: str, folder: Path, seed: int, size: tuple[int, int], item: tuple[str, int]) -> None:
    split, index = item
    rng = np.random.default_rng((list(_FILES).index(layout), seed, split == "val", index))
    for name, array in (make_room if layout == "nyuv2" else make_street)(rng, *size).items():
        path = folder / split / name / f"{index}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.save(file, array)


def _write_face(images: Path, seed: int, index: int) -> None:
    rng = np.random.default_rng((_FACES, seed, index))
    with replacing(images / _image_name(index + 1)) as unfinished:
        paint_face(draw_attributes(rng), rng).save(unfinished, format="JPEG", quality=92)


def _texts(faces: Sequence[Mapping[str, bool]], sizes: Sequence[int]) -> dict[str, str]:
    """CelebA's text files. Every face is a person of its own."""
    count = len(faces)
    attributes = [[2 * has[name] - 1 for name in ATTRIBUTES] for has in faces]
    return {
        # The real file has a space at the end of the line of names.
        "Anno/list_attr_celeba.txt": _table([f"{count}", " ".join(ATTRIBUTES) + " "], 2, attributes),
        "Anno/list_bbox_celeba.txt": _table([f"{count}", f"image_id {_SIDES}"], 3, [BOUNDS] * count),
        "Anno/list_landmarks_align_celeba.txt": _table([f"{count}", _POINTS], 3, [LANDMARKS] * count),
        "Anno/identity_CelebA.txt": _table([], 0, [[1 + index] for index in range(count)]),
        "Eval/list_eval_partition.txt": _table([], 0, np.repeat(range(len(sizes)), sizes)[:, None].tolist()),
    }


def _table(head: Sequence[str], width: int, rows: Sequence[Sequence[int]]) -> str:
    lines = [
        " ".join([_image_name(index + 1), *(str(number).rjust(width) for number in row)])
        for index, row in enumerate(rows)
    ]
    return "\n".join([*head, *lines, ""])
