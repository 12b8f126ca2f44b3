"""The file of the assembled molecules, which `python -m recipes.qm9.cache` builds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console

from recipes.common.command import exit_status, make_console, output_folder
from recipes.common.files import damaged, replacing, user_cache
from recipes.common.progress import make_progress
from recipes.qm9.molecules import Molecules
from recipes.qm9.source import CHECKSUMS, INSTALL, find_files, read_rows, verify_files

__all__ = ["cache_file", "load_cache", "main", "prepare_cache"]

# Raise it whenever the same source gives other molecules, or the file gets another layout.
_SCHEMA = 1
_MODULE = "python -m recipes.qm9.cache"
_WIDTH = 120


def cache_file(cache_dir: str | Path | None = None) -> Path:
    """The file in a folder; None: in `lightning_cost/qm9` in `$XDG_CACHE_HOME`, which is `~/.cache` unless set."""
    return Path(cache_dir or user_cache("qm9")) / "molecules.npz"


def prepare_cache(cache_dir: str | Path | None = None, console: Console | None = None) -> Path:
    """Build the file and return its path. This takes half a minute. A current file is left as it is.

    The file holds its schema and the checksums of its sources. Only these decide whether it is current, so the 225 MB
    of the package are not read again. The progress is shown on the terminal, or on another console.

    Raises:
        ModuleNotFoundError: If qm9pack or RDKit is not installed.
        ValueError: If the source is not as expected, or the existing file cannot be read.
    """
    path = cache_file(cache_dir)
    console = console or make_console(_WIDTH)
    if path.exists():
        if _read(path, ["origin"])["origin"].tolist() == _origin():
            return path
        console.print(f"{path} is from another version and is built anew.", markup=False, soft_wrap=True)
    molecules = _build(console)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, origin=np.array(_origin()), **molecules.arrays())
    return path


def load_cache(cache_dir: str | Path | None = None) -> Molecules:
    """Load the file of `prepare_cache`.

    Raises:
        FileNotFoundError: If it was not built yet.
        ValueError: If it is from another version of this recipe, or damaged.
    """
    path = cache_file(cache_dir)
    command = _MODULE if cache_dir is None else f"{_MODULE} --cache-dir {cache_dir}"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist yet. Build it: {command}")
    arrays = _read(path)
    try:
        if arrays.pop("origin").tolist() == _origin():
            return Molecules(**arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
    raise ValueError(f"{path} is from another version of this recipe. Build it anew: {command}")


def _origin() -> list[str]:
    return [f"schema {_SCHEMA}", *(f"{name} {checksum}" for name, checksum in CHECKSUMS.items())]


def _build(console: Console) -> Molecules:
    try:
        from recipes.qm9.assemble import assemble  # noqa: PLC0415 (RDKit is needed for this alone)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"RDKit, which finds the bonds, is not installed: {INSTALL}") from error

    paths = find_files()
    with make_progress(console) as progress:
        task = progress.add_task("Verifying the files of qm9pack", total=None)
        progress.update(task, total=verify_files(paths), description="Molecules of QM9")
        rows = chain.from_iterable(read_rows(path) for path in paths)
        return assemble(progress.track(rows, task_id=task))


def _read(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Read some of the arrays, or all of them. The archive has a checksum of each."""
    with path.open("rb") as opened:
        try:
            with np.load(opened, allow_pickle=False) as file:
                return {name: file[name] for name in names or file.files}
        except MemoryError:
            raise
        except Exception as error:
            # zipfile raises many kinds of exceptions for a damaged file.
            raise damaged(path, error) from error


def main(args: Sequence[str] | None = None) -> int:
    """Build the file, print where it is, and return the exit status; `args` is `sys.argv` by default."""
    parser = argparse.ArgumentParser(prog=_MODULE, description="Build the molecules of QM9 from the package qm9pack.")
    parser.add_argument("--cache-dir", type=output_folder, help=f"folder; default: {cache_file().parent}")
    options = parser.parse_args(args)
    console = make_console(_WIDTH)

    def build() -> None:
        path = prepare_cache(options.cache_dir, console)
        num, size = len(load_cache(options.cache_dir)), path.stat().st_size / 1e6
        console.print(f"{path}: {num:,} molecules, {size:.0f} MB", markup=False, soft_wrap=True)

    return exit_status(build, console, "Interrupted; nothing was written.")


if __name__ == "__main__":
    raise SystemExit(main())
