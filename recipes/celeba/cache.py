"""The resized images in one file that is mapped into memory: decoding them anew in every epoch would be most of it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from recipes.celeba.images import read_images
from recipes.celeba.listing import Listing
from recipes.common.command import make_console
from recipes.common.files import damaged, replacing, user_cache
from recipes.common.progress import make_progress

__all__ = ["cache_file", "load_images", "prepare_images"]

# To be raised whenever the same images give other pixels, or the file another layout.
_SCHEMA = 1
_WIDTH = 120


def cache_file(listing: Listing, size: int, cache_dir: str | Path | None = None) -> Path:
    """Where the resized images are kept: one file for each size and each set of images.

    Names and sizes of the image files tell sets apart, and not where they lie: a copy needs no second file.

    Args:
        listing: The images.
        size: Height and width to which they are resized.
        cache_dir: Folder; None: `lightning_cost/celeba` in `$XDG_CACHE_HOME`, which is `~/.cache` unless set.
    """
    digest = hashlib.sha256(f"{_SCHEMA}\n".encode())
    digest.update("\n".join(listing.names).encode())
    digest.update(listing.sizes.tobytes())
    return Path(cache_dir or user_cache("celeba")) / f"{size}x{size}-{digest.hexdigest()[:16]}.npy"


def prepare_images(
    listing: Listing,
    size: int,
    cache_dir: str | Path | None = None,
    num_threads: int = 1,
    anew: bool = False,
    console: Console | None = None,
) -> Path:
    """Read and resize all images, unless that was done already.

    Args:
        listing: The images.
        size: See `cache_file`.
        cache_dir: See `cache_file`.
        num_threads: How many images to read at the same time.
        anew: Whether to read them even if the file is there.
        console: Where to show the progress; None: the terminal.

    Returns:
        The file.

    Raises:
        OSError: If there is too little space for it.
        ValueError: If images cannot be read; the message names them, and no file is left behind.
    """
    path = cache_file(listing, size, cache_dir)
    if path.exists() and not anew:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = _shape(listing, size)
    needed, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"{path.parent} has room for {free / 1e9:.1f} GB, but the resized images need {needed / 1e9:.1f} GB. Choose"
            " another `cache_dir`, or make room."
        )
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        # Not through a map: a disk that is full ends the program there, and raises an error here.
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with make_progress(console or make_console(_WIDTH)) as progress:
            task = progress.add_task(f"Faces at {size} x {size}", total=len(listing))
            for images in read_images(listing.paths, size, num_threads):
                file.write(images.tobytes())
                progress.update(task, advance=len(images))
    return path


def load_images(listing: Listing, size: int, cache_dir: str | Path | None = None) -> NDArray[np.uint8]:
    """Map the file of `prepare_images` into memory.

    Returns:
        (N, 3, size, size), read-only, in the order of the listing.

    Raises:
        FileNotFoundError: If it was not prepared.
        ValueError: If it is damaged.
    """
    path = cache_file(listing, size, cache_dir)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: call `prepare_data()` of the data module, which builds it, first."
        )
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise damaged(path, str(error)) from error
    if images.shape != _shape(listing, size) or images.dtype != np.uint8:
        raise damaged(path, f"it has {images.dtype}{list(images.shape)}")
    return images


def _shape(listing: Listing, size: int) -> tuple[int, int, int, int]:
    return len(listing), 3, size, size
