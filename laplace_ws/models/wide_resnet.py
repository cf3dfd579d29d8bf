"""Wide residual networks, with and without normalisation."""

from __future__ import annotations

from math import gcd

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.models.dropout import dropout_layers
from laplace_ws.models.scalars import Bias, Scale
from laplace_ws.registry import Choice
from laplace_ws.values import whole_number

_STEM_CHANNELS = 16
_CONVS_PER_BRANCH = 2


class Norm(Choice):
    """What keeps the activations of a residual network in range."""

    FIXUP = "fixup"
    """Scalar biases and scales and an initialisation by depth [Zhang et al. 2019]."""
    BATCH = "batch"
    """Batch normalisation."""
    GROUP = "group"
    """Group normalisation in gcd(channels, 8) groups."""
    NONE = "none"
    """Nothing but Fixup's initialisation; convolutions have biases."""


class WideResNet(nn.Module):
    """Pre-activation wide residual network WRN-depth-width of basic blocks.

    A 3×3 convolution to 16 channels, three groups of (depth − 4)/6 blocks with 16, 32, and 64 times `width` channels,
    of which the second and the third halve the sides, then the mean over positions and a linear classifier. Images
    have any size.

    With `norm` "fixup" (and "none") a new network computes zero: the last convolution of every branch and the
    classifier start at zero, the first convolution of each of the L branches has He's deviation times L^(−1/2).

    Args:
        depth: 6n + 4 with n ≥ 1: 10, 16, 22, 28, 40…
        width: Multiple of channels, at least 1.
        in_channels: Channels of the images.
        n_classes: Number of outputs.
        norm: A `Norm` or its name.
        dropout: Share of the activations between the two convolutions of a block that are dropped in train mode.

    Raises:
        ValueError: the depth is not of that form, the width is below one, the norm is unknown, or the dropout is not in [0, 1).

    Source: Zagoruyko & Komodakis 2016; Zhang et al. 2019 for Fixup.
    """

    def __init__(
        self,
        depth: int = 16,
        width: int = 4,
        in_channels: int = 3,
        n_classes: int = 10,
        norm: Norm | str = Norm.FIXUP,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        in_channels, n_classes = (
            whole_number("in_channels", in_channels, least=1),
            whole_number("n_classes", n_classes, least=1),
        )
        n_blocks, rest = divmod(whole_number("depth", depth) - 4, 6)
        if rest or n_blocks < 1:
            raise ValueError(f"depth={depth} must be 6n + 4 with n at least 1; the nearest is {_nearest_depth(depth)}")
        if whole_number("width", width) < 1:
            raise ValueError(f"width={width} must be at least 1")
        norm = Norm(norm)
        widths = [_STEM_CHANNELS * width * factor for factor in (1, 2, 4)]
        blocks = []
        channels = _STEM_CHANNELS
        for group, out_channels in enumerate(widths):
            for block in range(n_blocks):
                stride = 2 if group > 0 and block == 0 else 1
                blocks.append(ResidualBlock(channels, out_channels, stride, norm, dropout))
                channels = out_channels

        self.stem: nn.Conv2d = _conv(in_channels, _STEM_CHANNELS, 3, 1, norm)
        self.blocks: nn.Sequential = nn.Sequential(*blocks)
        self.pre_pool: nn.Sequential = _pre_activation(channels, norm)
        self.pool: nn.Sequential = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier: nn.Linear = nn.Linear(channels, n_classes)
        self._initialise(norm)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        """Logits of images."""
        return self.classifier(self.pool(self.pre_pool(self.blocks(self.stem(x)))))

    @torch.no_grad()
    def _initialise(self, norm: Norm) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.classifier.bias)
        if norm in (Norm.FIXUP, Norm.NONE):
            nn.init.zeros_(self.classifier.weight)
            for block in (module for module in self.blocks if isinstance(module, ResidualBlock)):
                block.conv1.weight.mul_(len(self.blocks) ** (-1 / (2 * _CONVS_PER_BRANCH - 2)))
                nn.init.zeros_(block.conv2.weight)


class ResidualBlock(nn.Module):
    """Two pre-activated 3×3 convolutions in parallel with an identity.

    Where the shape changes, the identity is a 1×1 convolution of the pre-activated input [Zagoruyko & Komodakis 2016].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm, dropout: float = 0.0) -> None:
        super().__init__()
        self.pre1: nn.Sequential = _pre_activation(in_channels, norm)
        self.conv1: nn.Conv2d = _conv(in_channels, out_channels, 3, stride, norm)
        self.pre2: nn.Sequential = nn.Sequential(*_pre_activation(out_channels, norm), *dropout_layers(dropout))
        self.conv2: nn.Conv2d = _conv(out_channels, out_channels, 3, 1, norm)
        self.scale: Scale | nn.Identity = Scale() if norm is Norm.FIXUP else nn.Identity()
        same = in_channels == out_channels and stride == 1
        self.shortcut: nn.Conv2d | None = None if same else _conv(in_channels, out_channels, 1, stride, norm)

    def forward(self, x: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O h w"]:
        """Identity plus branch."""
        h = self.pre1(x)
        identity = x if self.shortcut is None else self.shortcut(h)
        return identity + self.scale(self.conv2(self.pre2(self.conv1(h))))


def _nearest_depth(depth: int) -> int:
    return max(round((depth - 4) / 6), 1) * 6 + 4


def _pre_activation(channels: int, norm: Norm) -> nn.Sequential:
    if norm is Norm.FIXUP:
        # Fixup asks for a bias before every nonlinearity and one before every weight.
        return nn.Sequential(Bias(), nn.ReLU(), Bias())
    if norm is Norm.BATCH:
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
    if norm is Norm.GROUP:
        return nn.Sequential(nn.GroupNorm(gcd(channels, 8), channels), nn.ReLU())
    return nn.Sequential(nn.ReLU())


def _conv(in_channels: int, out_channels: int, size: int, stride: int, norm: Norm) -> nn.Conv2d:
    # Everything but "none" shifts the activations elsewhere.
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=norm is Norm.NONE)
