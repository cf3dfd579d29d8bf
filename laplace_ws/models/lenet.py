"""A small convolutional network in the style of LeNet-5."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

_SMALLEST_SIDE = 12


class LeNet(nn.Sequential):
    """Two 5×5 convolutions with ReLU and max-pooling, then three linear layers of 120, 84, and `n_classes` outputs.

    The first convolution is padded, as LeNet-5 pads 28×28 digits to 32×32. Maps images `[N, C, H, W]` to logits
    `[N, K]`.

    Args:
        in_channels: Channels of the images.
        n_classes: Number of outputs.
        image_size: Height and width in pixels, or one number for both; at least 12.

    Raises:
        ValueError: a side is below 12.

    Source: LeCun et al. 1998, with today's activation and pooling.
    """

    def __init__(self, in_channels: int = 1, n_classes: int = 10, image_size: int | tuple[int, int] = 28) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < _SMALLEST_SIDE:
            raise ValueError(f"image_size={height}x{width} is too small; LeNet needs {_SMALLEST_SIDE}x{_SMALLEST_SIDE}")
        n_features = 16 * _side_before_linear(height) * _side_before_linear(width)
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, 6, 5, padding=2),
                act1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),
                act2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                linear1=nn.Linear(n_features, 120),
                act3=nn.ReLU(),
                linear2=nn.Linear(120, 84),
                act4=nn.ReLU(),
                classifier=nn.Linear(84, n_classes),
            )
        )


def _side_before_linear(side: int) -> int:
    return (side // 2 - 4) // 2
