"""MTAN: a SegNet from whose features each task selects by attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.dense.segnet import WIDTHS, SegNetTrunk, TrunkFeatures, conv_block, make_heads, reset_parameters

__all__ = ["Mtan", "MtanTrunk", "TaskAttention"]


class MtanTrunk(SegNetTrunk):
    """All that the tasks of MTAN share: the SegNet, and a convolution for each stage.

    As in the public code, these convolutions filter what a task's attention has selected, the same for all tasks. See
    `SegNetTrunk` for the argument.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__(widths)
        self.encoder_filters = nn.ModuleList(conv_block(*ends) for ends in pairwise((*widths, widths[-1])))
        self.decoder_filters = nn.ModuleList(conv_block(*ends) for ends in pairwise((*reversed(widths), widths[0])))


class TaskAttention(nn.Module):
    """The attention modules of one task, one for each stage of encoder and decoder.

    Each computes a mask between 0 and 1 from the input of the stage and the task's selection in the stage before. The
    mask multiplies the output of the stage.

    Args:
        widths: Features of the stages.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        first, *others = widths
        self.encoder = nn.ModuleList([_mask(first, first), *(_mask(2 * width, width) for width in others)])
        outward = pairwise((*reversed(widths), first))
        self.decoder = nn.ModuleList(_mask(inputs + outputs, outputs) for inputs, outputs in outward)

    def forward(
        self, features: TrunkFeatures, encoder_filters: Iterable[nn.Module], decoder_filters: Iterable[nn.Module]
    ) -> Tensor:
        """Select features of the task, (B, first width, H, W), with the shared convolutions of `MtanTrunk`."""
        selected: Tensor | None = None
        for mask, (first, last), filters in zip(self.encoder, features.encoder, encoder_filters, strict=True):
            seen = first if selected is None else torch.cat((first, selected), dim=1)
            selected = F.max_pool2d(filters(mask(seen) * last), kernel_size=2)
        assert selected is not None
        for mask, (unpooled, last), filters in zip(self.decoder, features.decoder, decoder_filters, strict=True):
            larger = F.interpolate(selected, scale_factor=2, mode="bilinear", align_corners=True)
            selected = mask(torch.cat((unpooled, filters(larger)), dim=1)) * last
        return selected


class Mtan(nn.Module):
    """SegNet with a Multi-Task Attention Network (Liu et al., 2019); see `SegNet` for the arguments.

    With the published widths it has 44.23 million parameters for the three tasks of NYUv2 and 41.21 million for the two
    tasks of CityScapes.

    Attributes:
        trunk: What the tasks share.
        attention: Task to its attention modules. Published code counts them as shared; here each belongs to its task.
        heads: Task to its head.
    """

    def __init__(self, tasks: Mapping[str, int], widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.trunk = MtanTrunk(widths)
        self.attention = nn.ModuleDict({task: TaskAttention(widths) for task in tasks})
        self.heads = make_heads(tasks, widths[0])
        reset_parameters(self)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Predict every task; see `SegNet.forward`."""
        features = self.trunk(image)
        shared = self.trunk.encoder_filters, self.trunk.decoder_filters
        return {task: head(self.attention[task](features, *shared)) for task, head in self.heads.items()}


def _mask(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, kernel_size=1),
        nn.BatchNorm2d(outputs),
        nn.Sigmoid(),
    )
