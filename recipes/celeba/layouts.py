"""Where the files of CelebA lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Layout", "find_layout"]


@dataclass(frozen=True)
class Layout:
    """Paths of what the recipe reads.

    Attributes:
        images: Folder of the aligned and cropped images.
        attributes: Text file of the attributes.
        partition: Text file that says which image belongs to which split.
    """

    images: Path
    attributes: Path
    partition: Path

    def below(self, root: Path) -> Layout:
        """The layout in a folder."""
        return Layout(root / self.images, root / self.attributes, root / self.partition)

    @property
    def missing(self) -> list[Path]:
        """What is not there."""
        files = [path for path in (self.attributes, self.partition) if not path.is_file()]
        return files if self.images.is_dir() else [self.images, *files]


_LAYOUTS = {
    "the authors' layout": Layout(
        Path("Img/img_align_celeba"), Path("Anno/list_attr_celeba.txt"), Path("Eval/list_eval_partition.txt")
    ),
    "torchvision's layout": Layout(
        Path("celeba/img_align_celeba"), Path("celeba/list_attr_celeba.txt"), Path("celeba/list_eval_partition.txt")
    ),
}


def find_layout(root: str | Path) -> Layout:
    """Find out which layout a folder has.

    Args:
        root: The folder that holds `Img`, `Anno` and `Eval` (the authors' layout), or `celeba` (torchvision's).

    Raises:
        FileNotFoundError: If there is no such folder, or neither layout is complete; the message says what is missing.
        ValueError: If both are there.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is not a folder. It must be the one that has the files of CelebA.")
    found = {name: layout.below(root) for name, layout in _LAYOUTS.items()}
    complete = [layout for layout in found.values() if not layout.missing]
    if len(complete) > 1:
        raise ValueError(
            f"root={str(root)!r} has CelebA twice, in {' and '.join(found)}. Move one of them elsewhere, so that it is"
            " clear which one is meant."
        )
    if complete:
        return complete[0]
    missing = "; ".join(f"{name} lacks {', '.join(map(str, layout.missing))}" for name, layout in found.items())
    raise FileNotFoundError(
        f"root={str(root)!r} has CelebA in neither layout: {missing}. The images come in img_align_celeba.zip, which is"
        " to be unpacked; nothing is downloaded."
    )
