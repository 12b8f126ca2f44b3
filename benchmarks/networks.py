"""Networks of the benchmarks, with any number of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from recipes.dense.mtan import Mtan
from recipes.dense.segnet import WIDTHS

__all__ = ["NETWORKS", "Images", "Network"]


class MultiTaskNet(nn.Module):
    """What the tasks share, and a head a task."""

    def __init__(self, shared: nn.Module, heads: nn.ModuleList) -> None:
        super().__init__()
        self.shared = shared
        self.heads = heads

    def forward(self, images: Tensor) -> list[Tensor]:
        """Predict every task."""
        features = self.shared(images)
        return [head(features) for head in self.heads]


class MtanNet(nn.Module):
    """MTAN with a channel a task."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        mtan = Mtan({str(task): 1 for task in range(num_tasks)}, WIDTHS)
        self.shared = mtan.trunk
        self.heads = nn.ModuleList(
            nn.ModuleList(parts) for parts in zip(mtan.attention.values(), mtan.heads.values(), strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Predict every task."""
        features = self.shared(images)
        filters = self.shared.encoder_filters, self.shared.decoder_filters
        return [head(attention(features, *filters)) for attention, head in self.heads]  # type: ignore[misc]


def _resnet(make: Callable[[], nn.Module], small: bool, num_tasks: int) -> nn.Module:
    backbone = make()
    width = backbone.fc.in_features
    if small:
        backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    backbone.fc = nn.Identity()
    heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(num_tasks))
    with torch.no_grad():
        # The tasks agree, so that a check that looks for conflict finds none.
        for head in heads:
            head.weight.mul_(0.1).add_(width**-0.5)
    return MultiTaskNet(backbone, heads)


@dataclass(frozen=True)
class Network:
    """A network and the batches it is measured with.

    Attributes:
        make: From the number of tasks to a network with the attribute ``shared``.
        batch_size: Images in a batch.
        size: Height and width of an image.
    """

    make: Callable[[int], nn.Module]
    batch_size: int
    size: tuple[int, int]

    def batch(self) -> Tensor:
        """A batch of random images, always the same."""
        return torch.randn(self.batch_size, 3, *self.size, generator=torch.Generator().manual_seed(0))


NETWORKS = {
    "resnet18": Network(partial(_resnet, resnet18, True), 16, (32, 32)),
    "resnet50": Network(partial(_resnet, resnet50, False), 64, (224, 224)),
    "segnet-mtan": Network(MtanNet, 2, (288, 384)),
}


class Images(torch.utils.data.IterableDataset[Tensor]):
    """The same batch so many times."""

    def __init__(self, network: Network, num_batches: int) -> None:
        self.batch = network.batch()
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter([self.batch] * self.num_batches)
