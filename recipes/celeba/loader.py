"""Batches of faces from images that are mapped into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.common.loader import BatchSampler

__all__ = ["FaceLoader"]


class FaceLoader:
    """Serves batches of some of the faces; Lightning saves and restores its position.

    A batch is a dict of `image` (B, 3, H, W), RGB in [0, 1], and `attributes` (B, 40), 0 or 1; both float32.

    Args:
        images: (N, 3, H, W), all of them.
        attributes: (N, 40), likewise.
        rows: Those to serve, by their place among all.
        sampler: What decides the batches of them. Named as in a `DataLoader`, where Lightning looks for `set_epoch`.
    """

    batch_sampler = None  # Lightning reads it of whatever has a sampler.

    def __init__(
        self, images: NDArray[np.uint8], attributes: NDArray[np.uint8], rows: NDArray[np.int64], sampler: BatchSampler
    ) -> None:
        self.images, self.attributes, self.rows = images, attributes, rows
        self.sampler = sampler

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for places in self.sampler:
            rows = self.rows[places.numpy()]
            yield {
                "image": torch.from_numpy(self.images[rows]).float().div_(255),
                "attributes": torch.from_numpy(self.attributes[rows]).float(),
            }

    def state_dict(self) -> dict[str, int]:
        """State of the sampler."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the sampler."""
        self.sampler.load_state_dict(state)
