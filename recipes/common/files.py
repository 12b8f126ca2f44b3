"""Files that are either complete or missing, and the cache folder of the recipes."""

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
    """Write a file in one piece: if the program ends too early, an old file of that name stays as it was.

    Yields:
        Another path in the same folder to write to. A killed program leaves it behind, hidden, with the ending `.part`.
    """
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield unfinished
        # After a power loss, the new name must not point to missing data.
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def user_cache(recipe: str) -> Path:
    """The folder `lightning_cost/<recipe>` in `$XDG_CACHE_HOME`, which is `~/.cache` unless set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_cost" / recipe


def damaged(path: Path, reason: object) -> ValueError:
    """The error for a damaged file in the cache."""
    return ValueError(f"{path} is damaged: {reason}. Delete it, and it is built anew: rm {shlex.quote(str(path))}")
