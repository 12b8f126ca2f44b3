"""Images as the benchmark sees them: decoded and resized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

__all__ = ["read_image", "read_images"]

# Enough to keep all threads busy, few enough that a slow disk to write to is never far behind.
_AT_ONCE = 1024
_NAMED = 5


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Read one image.

    Args:
        path: A JPEG file.
        size: Height and width that it gets, whatever its own: bilinear with antialiasing, as torchvision's `Resize`
            makes it of an image of Pillow.

    Returns:
        (3, size, size), RGB.

    Raises:
        ValueError: If it is no JPEG file, or a damaged one.
    """
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError) as error:
        reason = "it is none, or a damaged one" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path} cannot be read as a JPEG image: {reason}.") from error
    return np.asarray(resized).transpose(2, 0, 1)


def read_images(paths: Sequence[Path], size: int, num_threads: int) -> Iterator[NDArray[np.uint8]]:
    """Read many images at a time, in their order.

    Pillow decodes and resizes outside of Python, so that threads are enough.

    Args:
        paths: JPEG files.
        size: See `read_image`.
        num_threads: How many to read at the same time.

    Yields:
        (B, 3, size, size), the next ones.

    Raises:
        ValueError: After all were looked at, if some cannot be read; the message counts them and names the first.
    """
    unreadable: list[str] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for first in range(0, len(paths), _AT_ONCE):
            read = list(pool.map(partial(_try_read, size=size), paths[first : first + _AT_ONCE]))
            unreadable += [image for image in read if isinstance(image, str)]
            # Nobody gets to see those of a call that ends with an error.
            yield np.stack([np.zeros((3, size, size), np.uint8) if isinstance(image, str) else image for image in read])
    if unreadable:
        more = f"\nand {len(unreadable) - _NAMED} more" if len(unreadable) > _NAMED else ""
        raise ValueError(
            "\n".join(unreadable[:_NAMED])
            + f"{more}\n{len(unreadable)} of {len(paths)} images cannot be read. Unpack img_align_celeba.zip again."
        )


def _try_read(path: Path, size: int) -> NDArray[np.uint8] | str:
    try:
        return read_image(path, size)
    except ValueError as error:
        return str(error)
