"""Pure functions between raw bytes and what a model sees: choosing examples, normalising pixels."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from laplace_ws.errors import NumericalRepairWarning
from laplace_ws.values import tensor, whole_number


def balanced_indices(y: Int[Tensor, " N"], n: int, *, seed: int) -> Int[Tensor, " n"]:
    """Choose `n` examples at random, as evenly over the classes as the labels allow.

    Class counts differ by at most one, except that a class with too few examples contributes all of them. With the same seed,
    a smaller choice is contained in a larger one.

    Returns:
        Positions in `y` in ascending order, so the order of the data is kept.

    Raises:
        ValueError: `n` is below one or above the number of examples.
    """
    tensor("y", y, "[N] of class numbers", 1)
    if not 1 <= whole_number("n", n) <= len(y):
        raise ValueError(f"cannot choose {n} of {len(y)} examples; ask for 1 to {len(y)}")
    generator = torch.Generator().manual_seed(whole_number("seed", seed))
    y = y.cpu()
    shuffled = torch.randperm(len(y), generator=generator)
    # Stable sorting by label lines the classes up one after another, each in random order.
    by_class = shuffled[torch.sort(y[shuffled], stable=True).indices]
    _, counts = torch.unique_consecutive(y[by_class], return_counts=True)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    round_of_draw = torch.arange(len(y)) - first
    # Each round takes one example of every remaining class; a random class order decides who is cut off in the last round.
    turn = torch.repeat_interleave(torch.randperm(len(counts), generator=generator), counts)
    chosen = torch.argsort(round_of_draw * len(counts) + turn)[:n]
    return torch.sort(by_class[chosen]).values


def fitted(pixels: Float[Tensor, "N C H W"], shape: tuple[int, int, int]) -> Float[Tensor, "N D I J"]:
    """Images in the shape of others: a grey channel is repeated, and black is added on all sides, one more below and right if odd.

    Args:
        pixels: images, black at 0.
        shape: (channels, height, width), in pixels at least those of the images.

    Raises:
        ValueError: the images are larger, or have several channels and other ones than wanted.
    """
    channels, height, width = shape
    _, given, h, w = tensor("pixels", pixels, "of images [N, C, H, W]", 4).shape
    if h > height or w > width or given not in (1, channels):
        raise ValueError(f"images of {given}x{h}x{w} do not fit into {channels}x{height}x{width}; give smaller ones")
    top, left = (height - h) // 2, (width - w) // 2
    sides = (left, width - w - left, top, height - h - top)
    return torch.nn.functional.pad(pixels.expand(-1, channels, -1, -1), sides)


def channel_statistics(x: UInt8[Tensor, "N C H W"]) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and (biased) standard deviation of every channel, in units where 255 is 1, exact and in float64.

    A channel of zero deviation gets a deviation of 1, with a `NumericalRepairWarning`.
    """
    if tensor("x", x, "of images [N, C, H, W]", 4).dtype != torch.uint8 or not len(x):
        raise ValueError(f"x must hold images of bytes (torch.uint8), got {tuple(x.shape)} of {x.dtype}")
    histogram = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in x.unbind(1)]).double()
    value = torch.arange(256, dtype=torch.float64, device=x.device) / 255
    weight = histogram / histogram.sum(1, keepdim=True)
    mean = weight @ value
    std = (weight * (value - mean[:, None]) ** 2).sum(1).sqrt()
    constant = (histogram > 0).sum(1) == 1
    if constant.any():
        channels = constant.nonzero().flatten().tolist()
        warnings.warn(
            f"channels {channels} of the training images are constant; their deviation of 0 is replaced by 1",
            NumericalRepairWarning,
            stacklevel=2,
        )
    return mean, torch.where(constant, 1.0, std)


def normalise(
    x: UInt8[Tensor, "N C H W"], mean: Float[Tensor, " C"], std: Float[Tensor, " C"]
) -> Float[Tensor, "N C H W"]:
    """(x / 255 − mean) / std per channel, in the type and on the device of `mean`."""
    scaled = x.to(mean.device).to(mean.dtype).div_(255)
    return scaled.sub_(mean[:, None, None]).div_(std[:, None, None])
