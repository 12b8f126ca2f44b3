"""CelebA: 202,599 faces with 40 attributes each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.celeba.images import load_images, prepare_images
from recipes.celeba.listing import SPLITS, Listing, read_listing
from recipes.common.loader import BatchLoader, BatchSampler

__all__ = ["CelebADataModule", "Check"]

Check = Literal["files", "full"]


class CelebADataModule(L.LightningDataModule):
    """Faces of CelebA in the official splits.

    A batch is a dict of `image` (B, 3, H, W), RGB in [0, 1], and `attributes` (B, 40), 0 or 1; both float32.

    The images are decoded and resized once and kept in a file, which has 12 kB per image at the default size. So
    unreadable images are found before training starts.

    Args:
        root: Folder that contains `Img`, `Anno` and `Eval` (the authors' layout), or `celeba` with everything in it
            (torchvision's). Nothing is downloaded.
        batch_size: Faces per batch and process. An incomplete last training batch is dropped.
        image_size: Height and width to which the images are resized.
        num_workers: Number of threads that read images which are not resized yet; None: as many as there are CPUs.
        shuffle_seed: Seed of the order of the training batches. Nothing else decides the order, so runs with the same
            seed see the same batches.
        check: "files": check the text files, and that all images are there. "full": also read all images and resize
            them anew, even if they were resized before.
        cache_dir: Folder of the resized images; None: `lightning_cost/celeba` in the user's folder for caches.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 256,
        image_size: int = 64,
        num_workers: int | None = None,
        shuffle_seed: int = 0,
        check: Check = "files",
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        # Checkpoints keep the arguments, but PyTorch loads no paths from them.
        root = os.fspath(root)
        cache_dir = cache_dir if cache_dir is None else os.fspath(cache_dir)
        self.save_hyperparameters()
        num_workers = (os.cpu_count() or 1) if num_workers is None else num_workers
        # The network halves images three times.
        given = {"batch_size": (batch_size, 1), "image_size": (image_size, 8), "num_workers": (num_workers, 1)}
        for name, (value, least) in (given | {"shuffle_seed": (shuffle_seed, 0)}).items():
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        if check not in get_args(Check):
            raise ValueError(f"check={check!r} must be one of {get_args(Check)}.")
        self.root, self.batch_size, self.image_size, self.num_workers = root, batch_size, image_size, num_workers
        self.shuffle_seed, self.check, self.cache_dir = shuffle_seed, check, cache_dir
        self._listing: Listing | None = None
        self._images: NDArray[np.uint8] | None = None

    def prepare_data(self) -> None:
        """Check the files, and resize the images unless this was done already."""
        self._listing = read_listing(self.root)
        prepare_images(self._listing, self.image_size, self.cache_dir, self.num_workers, anew=self.check == "full")

    def setup(self, stage: str) -> None:
        """Map the images into memory, the same for every stage.

        Raises:
            FileNotFoundError: If `prepare_data` was never called for this data.
        """
        # With several processes, `prepare_data` read the listing in one of them only.
        self._listing = self._listing or read_listing(self.root)
        self._images = load_images(self._listing, self.image_size, self.cache_dir)

    def train_dataloader(self) -> BatchLoader:
        """Shuffled training batches."""
        return self._loader("train", self.shuffle_seed)

    def val_dataloader(self) -> BatchLoader:
        """Validation batches."""
        return self._loader("val", None)

    def test_dataloader(self) -> BatchLoader:
        """Test batches."""
        return self._loader("test", None)

    def _loader(self, split: str, shuffle_seed: int | None) -> BatchLoader:
        assert self._listing is not None
        assert self._images is not None
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        rows = np.flatnonzero(self._listing.splits == SPLITS.index(split))
        sampler = BatchSampler(len(rows), self.batch_size, shuffle_seed, rank, world_size)
        images, attributes = self._images, self._listing.attributes

        def fetch(places: Tensor) -> dict[str, Tensor]:
            chosen = rows[places.numpy()]
            return {
                "image": torch.from_numpy(images[chosen]).float().div_(255),
                "attributes": torch.from_numpy(attributes[chosen]).float(),
            }

        return BatchLoader(fetch, sampler)
