"""A prediction that does not depend on the image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.dense.losses import IGNORED

__all__ = ["MeanPredictor"]


class MeanPredictor(nn.Module):
    """Predicts the mean of the known targets for every pixel.

    For classes this is the share of each class, as logits; for depth the mean depth; for normals the direction of the
    mean normal. A network that is no better has learned nothing from the images.

    Args:
        examples: For each example, task to its target as `DenseExamples` gives it.
        channels: Task to the number of channels of its prediction.

    Raises:
        ValueError: If no pixel of a task is known.
    """

    def __init__(self, examples: Iterable[Mapping[str, Tensor]], channels: Mapping[str, int]) -> None:
        super().__init__()
        # In double precision, because there are millions of pixels.
        sums = {name: torch.zeros(number, dtype=torch.float64) for name, number in channels.items()}
        pixels = dict.fromkeys(channels, 0)
        for example in examples:
            for name, number in channels.items():
                values = _known_values(name, example[name], number)
                sums[name] += values.sum(dim=0)
                pixels[name] += len(values)
        for name, number in pixels.items():
            if number == 0:
                raise ValueError(f"`examples` must have a pixel whose {name} is known.")
            mean = sums[name] / number
            if name == "segmentation":
                mean = mean.clamp(min=torch.finfo(torch.float32).tiny).log()
            elif name == "normals":
                mean = F.normalize(mean, dim=0)
            self.register_buffer(name, mean.float())
        self.tasks = tuple(channels)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Predict every task as `SegNet` does. Only the shape of the image matters."""
        size = (len(image), -1, *image.shape[-2:])
        return {name: self.get_buffer(name)[:, None, None].expand(size) for name in self.tasks}


def _known_values(task: str, target: Tensor, channels: int) -> Tensor:
    """Values of the known pixels (pixels, channels), classes one-hot."""
    if task == "segmentation":
        return F.one_hot(target[target != IGNORED], channels)
    known = (target > 0).all(dim=0) if task == "depth" else (target != 0).any(dim=0)
    return target[:, known].T
