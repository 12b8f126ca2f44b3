"""The text files of CelebA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from recipes.scenes.attributes import ATTRIBUTES
from recipes.scenes.faces import Face

__all__ = ["TEXT_FOLDERS", "celeba_texts", "image_name"]

TEXT_FOLDERS: dict[str, str] = {
    "list_attr_celeba.txt": "Anno",
    "list_bbox_celeba.txt": "Anno",
    "list_landmarks_align_celeba.txt": "Anno",
    "identity_CelebA.txt": "Anno",
    "list_eval_partition.txt": "Eval",
}
"""Text file to the folder that it lies in where the authors put it."""

_BOUNDS = "image_id x_1 y_1 width height"
_LANDMARKS = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y"


def image_name(index: int) -> str:
    """File name of an image; they count from 1."""
    return f"{index + 1:06d}.jpg"


def celeba_texts(faces: Sequence[Face], sizes: Sequence[int]) -> dict[str, str]:
    """What the text files say.

    Args:
        faces: All faces, in the order of their images.
        sizes: How many of them are for training, validation and testing, in this order.

    Returns:
        Name of a file to its text. Each face is a person of its own, and unlike CelebA's its bounds are those in the
        aligned image.
    """
    parts = [part for part, size in enumerate(sizes) for _ in range(size)]
    # The real file ends this line, and only this one, with a space.
    names = " ".join(ATTRIBUTES) + " "
    attributes = ([1 if face.has[name] else -1 for name in ATTRIBUTES] for face in faces)
    landmarks = ([round(number) for point in face.landmarks for number in point] for face in faces)
    return {
        "list_attr_celeba.txt": _table(attributes, [str(len(faces)), names], align=2),
        "list_bbox_celeba.txt": _table((map(round, face.bounds) for face in faces), [str(len(faces)), _BOUNDS], 3),
        "list_landmarks_align_celeba.txt": _table(landmarks, [str(len(faces)), _LANDMARKS], 3),
        "identity_CelebA.txt": _table(([1 + index] for index in range(len(faces))), []),
        "list_eval_partition.txt": _table(([part] for part in parts), []),
    }


def _table(rows: Iterable[Iterable[int]], head: Sequence[str], align: int = 0) -> str:
    lines = [
        " ".join([image_name(index), *(f"{number:{align}d}" if align else str(number) for number in row)])
        for index, row in enumerate(rows)
    ]
    return "\n".join([*head, *lines]) + "\n"
