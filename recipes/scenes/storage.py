"""Files that are complete or not there, in folders that know what was written into them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

__all__ = ["SETTINGS_FILE", "claim_folder", "write_atomically", "write_text"]

SETTINGS_FILE = "scenes.json"


def claim_folder(folder: Path, settings: Mapping[str, str | int]) -> None:
    """Make a folder for the files of some settings, or go on with one that was begun with the same ones.

    Args:
        folder: Where the data go; `scenes.json` in it says with which settings they are made.
        settings: All that decides the files.

    Raises:
        FileExistsError: If the folder holds anything else, or data of other settings.
    """
    path = folder / SETTINGS_FILE
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != settings:
            names = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
            differences = ", ".join(f"{name}={found.get(name)!r} there, {settings.get(name)!r} now" for name in names)
            raise FileExistsError(
                f"folder={str(folder)!r} holds scenes of other settings ({differences}): choose another folder, or"
                " delete this one."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"folder={str(folder)!r} must be empty, new, or begun by this command, which leaves {SETTINGS_FILE} in it."
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=1) + "\n")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name first, so that it is complete once it is there."""
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as file:
        write(file)
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file like `write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))
