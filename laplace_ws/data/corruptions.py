"""Damaged images: noise, blur and loss of contrast at five strengths, to see what a network predicts when its inputs drift.

| strength | 1 | 2 | 3 | 4 | 5 |
|---|---|---|---|---|---|
| noise: standard deviation of Gaussian noise, in units where the brightest pixel is 1 | 0.08 | 0.12 | 0.18 | 0.26 | 0.38 |
| blur: standard deviation of a Gaussian blur, in pixels | 0.5 | 0.75 | 1 | 1.5 | 2 |
| contrast: factor on the distance of a pixel to its image's mean | 0.75 | 0.5 | 0.4 | 0.3 | 0.15 |

The noise is that of ImageNet-C, the contrast that of CIFAR-10-C [Hendrycks & Dietterich 2019]; the strengths of the blur suit
images of about 30 pixels per side.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.registry import Choice
from laplace_ws.threads import alone_with_random_state
from laplace_ws.values import tensor, whole_number


class Corruption(Choice):
    """A way to damage images."""

    NOISE = "noise"
    BLUR = "blur"
    CONTRAST = "contrast"


PARAMETERS: dict[Corruption, tuple[float, ...]] = {
    Corruption.NOISE: (0.08, 0.12, 0.18, 0.26, 0.38),
    Corruption.BLUR: (0.5, 0.75, 1.0, 1.5, 2.0),
    Corruption.CONTRAST: (0.75, 0.5, 0.4, 0.3, 0.15),
}
"""Parameter that torchvision gets at strengths 1 to 5, see the table of this module."""

STRENGTHS = (1, 2, 3, 4, 5)


def corrupt(
    pixels: Float[Tensor, "N C H W"], corruption: Corruption | str, strength: int, *, seed: int = 0
) -> Float[Tensor, "N C H W"]:
    """Damage images whose pixels lie in [0, 1]; those of the result do too, to rounding.

    Args:
        pixels: images of one or three channels, before normalisation.
        corruption: "noise", "blur" or "contrast".
        strength: from 1 to 5, see the table of this module.
        seed: of the noise, whose pattern is the same at every strength. The global random state is neither used nor changed.

    Raises:
        ValueError: unknown corruption or strength, pixels outside [0, 1], or images too small for the blur.
    """
    from torchvision.transforms.v2 import functional as transforms

    corruption = Corruption(corruption)
    tensor("pixels", pixels, "of images [N, C, H, W]", 4)
    seed = whole_number("seed", seed)
    if pixels.shape[1] not in (1, 3) or not pixels.is_floating_point():
        raise ValueError(
            f"pixels must be floating point images of one or three channels, got {tuple(pixels.shape)} of {pixels.dtype}"
        )
    if whole_number("strength", strength) not in STRENGTHS:
        raise ValueError(f"strength={strength} must be from {STRENGTHS[0]} to {STRENGTHS[-1]}")
    if pixels.numel() and not 0 <= pixels.min() <= pixels.max() <= 1:
        raise ValueError(
            f"pixels span {pixels.min().item():.3g} to {pixels.max().item():.3g}; give them in [0, 1], before normalisation"
        )
    parameter = PARAMETERS[corruption][strength - 1]
    if corruption is Corruption.CONTRAST:
        return transforms.adjust_contrast(pixels, parameter)
    if corruption is Corruption.BLUR:
        return transforms.gaussian_blur(pixels, _kernel_size(pixels, parameter), [parameter])
    devices = [pixels.device] if pixels.is_cuda else []
    with alone_with_random_state(), torch.random.fork_rng(devices=devices):  # torchvision's noise takes no generator
        torch.manual_seed(seed)
        return transforms.gaussian_noise(pixels, sigma=parameter)


def _kernel_size(pixels: Float[Tensor, "N C H W"], sigma: float) -> list[int]:
    """Odd side that holds three standard deviations to each side; the borders are mirrored, which needs as many pixels."""
    reach = math.ceil(3 * sigma)
    if min(pixels.shape[-2:]) <= reach:
        raise ValueError(
            f"images of {pixels.shape[-2]}x{pixels.shape[-1]} pixels are too small for a blur of {sigma:g} pixels, which needs "
            f"sides of {reach + 1} at least; leave the blur out"
        )
    return [2 * reach + 1, 2 * reach + 1]
