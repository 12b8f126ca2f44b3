"""The file that keeps the assembled molecules: `python -m recipes.qm9.cache` builds it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console

from recipes.common.command import exit_status, make_console
from recipes.common.files import damaged, replacing, user_cache
from recipes.common.progress import make_progress
from recipes.qm9.molecules import Molecules
from recipes.qm9.source import CHECKSUMS, INSTALL, find_files, read_rows, verify_files

__all__ = ["cache_file", "load_cache", "main", "prepare_cache"]

# To be raised whenever the same source gives other molecules, or the file another layout.
_SCHEMA = 1
_MODULE = "python -m recipes.qm9.cache"
_WIDTH = 120


def cache_file(cache_dir: str | Path | None = None) -> Path:
    """Where the molecules are kept.

    Args:
        cache_dir: Folder; None: `lightning_cost/qm9` in `$XDG_CACHE_HOME`, which is `~/.cache` unless set.
    """
    return Path(cache_dir or user_cache("qm9")) / "molecules.npz"


def prepare_cache(cache_dir: str | Path | None = None, console: Console | None = None) -> Path:
    """Build the file unless it is there and current; takes half a minute, once.

    The file remembers its schema and the checksums of the files that it was built from. Both are compared with those
    that this version of the recipe wants, and nothing else, so that neither the package nor its 225 MB are read again.

    Args:
        cache_dir: See `cache_file`.
        console: Where to show the progress; None: the terminal.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: If the packages that it is built from are not installed.
        ValueError: If the source is not as expected, or the file that is there cannot be read.
    """
    path = cache_file(cache_dir)
    console = console or make_console(_WIDTH)
    if path.exists():
        if _read(path, ["origin"])["origin"].tolist() == _origin():
            return path
        console.print(f"{path} is of another version and is built anew.", markup=False, soft_wrap=True)
    _write(path, _build(console))
    return path


def load_cache(cache_dir: str | Path | None = None) -> Molecules:
    """Load the molecules that `prepare_cache` has built.

    Raises:
        FileNotFoundError: If they are not built yet.
        ValueError: If the file is of another version of this recipe, or damaged.
    """
    path = cache_file(cache_dir)
    command = _MODULE if cache_dir is None else f"{_MODULE} --cache-dir {cache_dir}"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there yet. Build it: {command}")
    arrays = _read(path)
    try:
        origin = arrays.pop("origin").tolist()
        if origin == _origin():
            return Molecules(**arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
    raise ValueError(f"{path} is of another version of this recipe. Build it anew: {command}")


def _origin() -> list[str]:
    return [f"schema {_SCHEMA}", *(f"{name} {checksum}" for name, checksum in CHECKSUMS.items())]


def _build(console: Console) -> Molecules:
    try:
        from recipes.qm9.assemble import assemble  # noqa: PLC0415 (RDKit is needed for this alone)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"Bonds come from RDKit, which is not installed: {INSTALL}") from error

    paths = find_files()
    with make_progress(console) as progress:
        task = progress.add_task("Verifying the files of qm9pack", total=None)
        progress.update(task, total=verify_files(paths), description="Molecules of QM9")
        rows = chain.from_iterable(read_rows(path) for path in paths)
        return assemble(progress.track(rows, task_id=task))


def _write(path: Path, molecules: Molecules) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, origin=np.array(_origin()), **molecules.arrays())


def _read(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Read some of the arrays, or all; the archive has a checksum of each."""
    with path.open("rb") as opened:
        try:
            with np.load(opened, allow_pickle=False) as file:
                return {name: file[name] for name in names or file.files}
        except MemoryError:
            raise
        except Exception as error:
            # A file that could be opened and not read: there is hardly an exception that zipfile does not raise then.
            raise damaged(path, error) from error


def main(args: Sequence[str] | None = None) -> int:
    """Build the file, and print where it is.

    Args:
        args: Command line without the program's name; None: `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog=_MODULE, description="Build the molecules of QM9 from the package qm9pack.")
    parser.add_argument("--cache-dir", type=Path, help=f"folder; default: {cache_file().parent}")
    options = parser.parse_args(args)
    console = make_console(_WIDTH)

    def build() -> None:
        path = prepare_cache(options.cache_dir, console)
        num, size = len(load_cache(options.cache_dir)), path.stat().st_size / 1e6
        console.print(f"{path}: {num:,} molecules, {size:.0f} MB", markup=False, soft_wrap=True)

    return exit_status(build, console, "Interrupted; nothing was written.")


if __name__ == "__main__":
    raise SystemExit(main())
