"""Folders that know what is written into them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from recipes.common.files import replacing

__all__ = ["SETTINGS_FILE", "claim_folder"]

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
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
