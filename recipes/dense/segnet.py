"""SegNet: an encoder like VGG16's, a decoder that mirrors it, and one head per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WIDTHS", "SegNet", "SegNetTrunk", "TrunkFeatures", "conv_block", "make_heads", "reset_parameters"]

WIDTHS = (64, 128, 256, 512, 512)
"""The published numbers of features of the five stages."""

# Number of convolutions in each stage of VGG16. The decoder mirrors them.
_DEPTHS = (2, 2, 3, 3, 3)
# A shorter vector has no direction.
_SHORTEST = 1e-6


class TrunkFeatures(NamedTuple):
    """The outputs of a trunk, stage by stage. Stage `s` of encoder and decoder has 1 / 2^s of the size of the image.

    Attributes:
        encoder: Outputs of the first and the last convolution of each stage, from the first stage to the last.
        decoder: The unpooled input and the output of each stage, from the last stage to the first.
    """

    encoder: list[tuple[Tensor, Tensor]]
    decoder: list[tuple[Tensor, Tensor]]


class SegNetTrunk(nn.Module):
    """Encoder and decoder of SegNet (Badrinarayanan et al., 2017), as in the public code of MTAN.

    Five stages of convolutions, each followed by pooling, and five that undo them. Unpooling puts every value back
    where the maximum was, with zeros around it. PyTorch has no deterministic unpooling on GPUs, so train there with
    `Trainer(deterministic="warn")` instead of `True`.

    Args:
        widths: Features of the stages.

    Raises:
        ValueError: If there are not five positive widths.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        if len(widths) != len(_DEPTHS) or min(widths) < 1:
            raise ValueError(f"widths={tuple(widths)} must be {len(_DEPTHS)} positive numbers, one per stage.")
        self.encoder = _stages((3, *widths), _DEPTHS)
        self.decoder = _stages((*reversed(widths), widths[0]), _DEPTHS[::-1])

    def forward(self, image: Tensor) -> TrunkFeatures:
        """Compute the features of all stages from images (B, 3, H, W), H and W multiples of 32.

        Raises:
            ValueError: If the image has another shape.
        """
        factor = 2 ** len(_DEPTHS)
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % factor or image.shape[3] % factor:
            raise ValueError(
                f"The image has shape {tuple(image.shape)}, but must have shape (B, 3, H, W) with H and W multiples of"
                f" {factor}, because it is halved {len(_DEPTHS)} times. Resize or pad it."
            )
        encoder, decoder, maxima = [], [], []
        x = image
        for stage in self.encoder:
            encoder.append(stage(x))
            x, positions = F.max_pool2d(encoder[-1][1], kernel_size=2, return_indices=True)
            maxima.append(positions)
        for stage in self.decoder:
            unpooled = F.max_unpool2d(x, maxima.pop(), kernel_size=[2, 2])
            x = stage(unpooled)[1]
            decoder.append((unpooled, x))
        return TrunkFeatures(encoder, decoder)


class SegNet(nn.Module):
    """One SegNet for all tasks: the trunk is shared, and each task has a head.

    With the published widths it has 25.06 million parameters for the three tasks of NYUv2 and 25.02 million for the two
    tasks of CityScapes.

    Args:
        tasks: Task to the number of channels of its prediction. The prediction of `normals` is scaled to unit length.
        widths: Features of the stages.

    Raises:
        ValueError: If there is no task, or a width or a number of channels is not positive.

    Attributes:
        trunk: What the tasks share.
        heads: Task to its head.
    """

    def __init__(self, tasks: Mapping[str, int], widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.trunk = SegNetTrunk(widths)
        self.heads = make_heads(tasks, widths[0])
        reset_parameters(self)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Predict every task.

        Args:
            image: (B, 3, H, W), H and W multiples of 32.

        Returns:
            Task to its prediction (B, channels, H, W): logits for a segmentation, unit vectors for `normals`.
        """
        _, output = self.trunk(image).decoder[-1]
        return {task: head(output) for task, head in self.heads.items()}


class _Stage(nn.Module):
    """A convolution that changes the number of features, and others that keep it."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.first = conv_block(inputs, outputs)
        self.rest = nn.Sequential(*(conv_block(outputs, outputs) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        return first, self.rest(first)


def _stages(widths: Sequence[int], depths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(_Stage(*ends, depth) for ends, depth in zip(pairwise(widths), depths, strict=True))


class _UnitLength(nn.Module):
    """Scales vectors along the channels to unit length. A vector too short to have a direction becomes zero.

    Where ReLU leaves no feature, a head without bias predicts exactly zero. Published code divides by its length, which
    gives NaN. Dividing by a small constant instead would blow up the gradient of such a pixel.
    """

    def forward(self, x: Tensor) -> Tensor:
        # The squares would overflow or underflow in half precision.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        length = x.norm(dim=1, keepdim=True)
        return x / length.where(length > _SHORTEST, torch.inf)


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """A 3 x 3 convolution that keeps the size, batch normalization and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def make_heads(tasks: Mapping[str, int], width: int) -> nn.ModuleDict:
    """One head per task for `width` features: a 3 x 3 and a 1 x 1 convolution with nothing between them, as published.

    Raises:
        ValueError: If there is no task, or a number of channels is not positive.
    """
    if not tasks or min(tasks.values()) < 1:
        raise ValueError(f"tasks={dict(tasks)} must map one or more tasks to their numbers of channels, at least 1.")
    heads = nn.ModuleDict()
    for task, channels in tasks.items():
        convolutions = (nn.Conv2d(width, width, kernel_size=3, padding=1), nn.Conv2d(width, channels, kernel_size=1))
        heads[task] = nn.Sequential(*convolutions, *([_UnitLength()] if task == "normals" else []))
    return heads


def reset_parameters(network: nn.Module) -> None:
    """Initialize the convolutions as published: weights by Xavier's normal distribution, biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
