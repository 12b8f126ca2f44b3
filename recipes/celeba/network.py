"""The convolutional network of the benchmark, which the public code of FAMO and FairGrad trains on CelebA.

It has seven convolutions with three poolings between them, the mean over the remaining pixels, and two linear layers.
Batch normalization and ReLU follow each convolution and linear layer.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["FaceNet"]

# Channels of the convolutions in multiples of the width. The image is halved between two blocks.
_BLOCKS = ((1,), (2, 2), (4, 4), (8, 8))
_NUM_LINEAR = 2


class FaceNet(nn.Module):
    """Images to features that the tasks share.

    Args:
        width: Channels of the first convolution. An image gets `8 * width` features.

    Attributes:
        num_features: Number of features.

    Raises:
        ValueError: If `width` is below 1.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width} must be at least 1.")
        layers: list[nn.Module] = []
        channels = 3
        for block in _BLOCKS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for factor in block:
                # The normalization that follows would remove a bias.
                convolution = nn.Conv2d(channels, factor * width, 3, padding=1, bias=False)
                channels = factor * width
                layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        for _ in range(_NUM_LINEAR):
            layers += [nn.Linear(channels, channels, bias=False), nn.BatchNorm1d(channels), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.num_features = channels

    def forward(self, image: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, 3, H, W), RGB in [0, 1], at least 8 x 8."""
        return self.layers(image)
