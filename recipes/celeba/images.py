"""The images, resized once and kept in a file that is mapped into memory.

Decoding the images in every epoch would take most of its time.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from recipes.celeba.listing import Listing
from recipes.common.command import make_console
from recipes.common.files import damaged, replacing, user_cache
from recipes.common.progress import make_progress

__all__ = ["cache_file", "load_images", "prepare_images"]

# Raise it whenever the same images give other pixels, or the file gets another layout.
_SCHEMA = 1
_WIDTH = 120
# Enough to keep all threads busy, and few enough that writing to a slow disk never falls far behind.
_AT_ONCE = 1024
# Number of unreadable images that a message names.
_NAMED = 5


def cache_file(listing: Listing, size: int, cache_dir: str | Path | None = None) -> Path:
    """The file of the resized images, one for each size and each set of images.

    Sets are told apart by the names and the sizes of the image files, so a copy in another folder needs no second file.

    Args:
        listing: The images.
        size: Height and width to which the images are resized.
        cache_dir: Folder; None: `lightning_cost/celeba` in `$XDG_CACHE_HOME`, which is `~/.cache` unless set.
    """
    digest = hashlib.sha256(f"{_SCHEMA}\n".encode())
    digest.update("\n".join(listing.names).encode())
    digest.update(listing.sizes.tobytes())
    return Path(cache_dir or user_cache("celeba")) / f"{size}x{size}-{digest.hexdigest()[:16]}.npy"


def prepare_images(
    listing: Listing, size: int, cache_dir: str | Path | None = None, num_threads: int = 1, anew: bool = False
) -> None:
    """Read and resize all images, `num_threads` at a time, unless this was done already and `anew` is False.

    Raises:
        OSError: If the disk has too little space.
        ValueError: If images cannot be read. The message names them, and no file is left behind.
    """
    path = cache_file(listing, size, cache_dir)
    if path.exists() and not anew:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(listing), 3, size, size)
    needed, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"{path.parent} has room for {free / 1e9:.1f} GB, but the resized images need {needed / 1e9:.1f} GB. Choose"
            " another `cache_dir`, or make room."
        )
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        # Not written through a memory map, because a full disk would then end the program instead of raising an error.
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with make_progress(make_console(_WIDTH)) as progress:
            task = progress.add_task(f"Faces at {size} x {size}", total=len(listing))
            for images in _read_images(listing, size, num_threads):
                file.write(images.tobytes())
                progress.update(task, advance=len(images))


def load_images(listing: Listing, size: int, cache_dir: str | Path | None = None) -> NDArray[np.uint8]:
    """Map the file of `prepare_images` into memory, read-only: RGB (N, 3, size, size) in the order of the listing.

    Raises:
        FileNotFoundError: If the images were not prepared.
        ValueError: If the file is damaged.
    """
    path = cache_file(listing, size, cache_dir)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Call `prepare_data()` of the data module first to build it.")
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise damaged(path, str(error)) from error
    if images.shape != (len(listing), 3, size, size) or images.dtype != np.uint8:
        raise damaged(path, f"it has {images.dtype}{list(images.shape)}")
    return images


def _read_images(listing: Listing, size: int, num_threads: int) -> Iterator[NDArray[np.uint8]]:
    """Read the images in their order, many at a time.

    Pillow releases the GIL while it decodes and resizes, so threads are enough. Errors are raised at the end, when all
    images have been tried: the message counts the unreadable images and names the first.
    """
    paths = [listing.layout.images / name for name in listing.names]
    unreadable: list[str] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for first in range(0, len(paths), _AT_ONCE):
            read = list(pool.map(partial(_read_image, size=size), paths[first : first + _AT_ONCE]))
            unreadable += [image for image in read if isinstance(image, str)]
            # Nobody will see the zeros, because the error at the end discards the file.
            yield np.stack([np.zeros((3, size, size), np.uint8) if isinstance(image, str) else image for image in read])
    if unreadable:
        more = f"\nand {len(unreadable) - _NAMED} more" if len(unreadable) > _NAMED else ""
        raise ValueError(
            "\n".join(unreadable[:_NAMED])
            + f"{more}\n{len(unreadable)} of {len(paths)} images cannot be read. Unpack img_align_celeba.zip again."
        )


def _read_image(path: Path, size: int) -> NDArray[np.uint8] | str:
    """Read a JPEG file as RGB (3, size, size), or return what is wrong with it.

    As torchvision's `Resize` does for images of Pillow, the resizing is bilinear with antialiasing.
    """
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError) as error:
        reason = "it is another file, or damaged" if isinstance(error, UnidentifiedImageError) else error
        return f"{path} cannot be read as a JPEG image: {reason}."
    return np.asarray(resized).transpose(2, 0, 1)
