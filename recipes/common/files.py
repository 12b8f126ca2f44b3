"""Files that are complete or not there, and the folder where recipes keep what they build from data."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["damaged", "replacing", "user_cache"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that takes its name when all is written: whatever ends the program leaves no half file.

    Args:
        path: The name to take. What has it until then stays as it is if the writing fails.

    Yields:
        A new name in the same folder. A killed program leaves it behind, hidden, with the ending `.part`.
    """
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield unfinished
        # On the disk before it has the name, or a loss of power could leave the name and nothing behind it.
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def user_cache(recipe: str) -> Path:
    """The folder `lightning_cost/<recipe>` in `$XDG_CACHE_HOME`, which is `~/.cache` unless set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_cost" / recipe


def damaged(path: Path, reason: object) -> ValueError:
    """What to raise about a file of the cache that cannot be read."""
    return ValueError(f"{path} is damaged: {reason}. Delete it, and it is built anew: rm {shlex.quote(str(path))}")
