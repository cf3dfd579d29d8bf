"""A small convolutional network in the style of LeNet-5."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from laplace_ws.models.dropout import dropout_layers
from laplace_ws.values import shown, whole_number

_SMALLEST_SIDE = 12


class LeNet(nn.Sequential):
    """Two 5×5 convolutions with ReLU and max-pooling, then three linear layers of 120, 84, and `n_classes` outputs.

    The first convolution is padded, as LeNet-5 pads 28×28 digits to 32×32. Maps images `[N, C, H, W]` to logits
    `[N, K]`.

    Args:
        in_channels: Channels of the images.
        n_classes: Number of outputs.
        image_size: Height and width in pixels, or one number for both; at least 12.
        dropout: Share of the inputs of each linear layer that are dropped in train mode.

    Raises:
        ValueError: a side is below 12, or the dropout is not in [0, 1).

    Source: LeCun et al. 1998, with today's activation and pooling.
    """

    def __init__(
        self,
        in_channels: int = 1,
        n_classes: int = 10,
        image_size: int | tuple[int, int] = 28,
        dropout: float = 0.0,
    ) -> None:
        height, width = sides(image_size)
        in_channels, n_classes = (
            whole_number("in_channels", in_channels, least=1),
            whole_number("n_classes", n_classes, least=1),
        )
        if min(height, width) < _SMALLEST_SIDE:
            raise ValueError(f"image_size={height}x{width} is too small; LeNet needs {_SMALLEST_SIDE}x{_SMALLEST_SIDE}")

        def dropping(i: int) -> dict[str, nn.Module]:
            return {f"drop{i}": layer for layer in dropout_layers(dropout)}

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
                **dropping(1),
                linear1=nn.Linear(n_features, 120),
                act3=nn.ReLU(),
                **dropping(2),
                linear2=nn.Linear(120, 84),
                act4=nn.ReLU(),
                **dropping(3),
                classifier=nn.Linear(84, n_classes),
            )
        )


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, given both or one number for both.

    Raises:
        TypeError: it is neither.
        ValueError: a side is below 1.
    """
    if isinstance(image_size, (tuple, list)):
        if len(image_size) != 2:
            raise TypeError(f"image_size must be one whole number, or height and width, got {shown(image_size)}.")
        height, width = image_size
    else:
        height = width = image_size
    return whole_number("image_size", height, least=1), whole_number("image_size", width, least=1)


def _side_before_linear(side: int) -> int:
    return (side // 2 - 4) // 2
