"""Patches of convolutions, of any dimension, stride, padding, dilation and number of groups."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ConvGeometry:
    """Shape of a convolution, one entry per spatial axis.

    Attributes:
        kernel: kernel sizes.
        stride: strides.
        padding: zeros added (before, after) each axis.
        dilation: distances between taps.
        groups: number of channel groups.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def from_call(
        cls,
        weight: Tensor,
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> ConvGeometry:
        """Read the arguments of `torch.nn.functional.conv{1,2,3}d` for a weight `[O, I, *kernel]`."""
        kernel = tuple(weight.shape[2:])
        pads: tuple[tuple[int, int], ...]
        dilations = per_axis(dilation, len(kernel))
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
            pads = tuple((total // 2, total - total // 2) for total in totals)  # torch puts the odd zero at the end
        elif isinstance(padding, str):  # "valid"
            pads = ((0, 0),) * len(kernel)
        else:
            pads = tuple((p, p) for p in per_axis(padding, len(kernel)))
        return cls(kernel, per_axis(stride, len(kernel)), pads, dilations, groups)

    def taps(self, axis: int, size: int) -> Int[Tensor, "K out"]:
        """Position that tap k reads for each output along `axis` of length `size`; outside 0 … size−1 lies padding."""
        k, s, d = self.kernel[axis], self.stride[axis], self.dilation[axis]
        before, after = self.padding[axis]
        n_out = (size + before + after - d * (k - 1) - 1) // s + 1
        return (torch.arange(k) * d - before)[:, None] + torch.arange(n_out) * s


def per_axis(value: int | tuple[int, ...], n_axes: int) -> tuple[int, ...]:
    """A value for each spatial axis, of one for all or of one for each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n_axes if len(values) == 1 else values


def n_positions(geometry: ConvGeometry, size: tuple[int, ...]) -> int:
    """Number of output positions of a convolution over an image of spatial `size`."""
    return prod(geometry.taps(axis, length).shape[1] for axis, length in enumerate(size))


def patches(x: Float[Tensor, "N C *S"], geometry: ConvGeometry) -> Float[Tensor, "*G N R I"]:
    """Input patch of each output position (im2col), with a leading group axis where there are groups.

    I runs over (channel in group, *kernel) row-major, as `weight.flatten(1)` does. The slow path, and the reference for the fast ones.
    """
    windows = _windows(x, geometry)
    n_axes = len(geometry.kernel)
    rows = windows.permute(0, *range(3 + n_axes, 3 + 2 * n_axes), 1, 2, *range(3, 3 + n_axes))  # [N, *out, G, C/G, *K]
    rows = rows.reshape(len(x), -1, geometry.groups, x.shape[1] // geometry.groups * prod(geometry.kernel))
    return _groups_first(rows, geometry.groups)


def patch_columns(x: Float[Tensor, "N C *S"], geometry: ConvGeometry) -> Float[Tensor, "N G I R"]:
    """`patches` with the output positions last, as they lie in memory: a faster copy than `patches`."""
    windows = _windows(x, geometry)
    return windows.flatten(3 + len(geometry.kernel)).flatten(2, 2 + len(geometry.kernel))


def _windows(x: Tensor, geometry: ConvGeometry) -> Float[Tensor, "N G C_G *K *out"]:
    """A view of the padded input with an axis for each tap and each output."""
    x = F.pad(x, [p for pair in reversed(geometry.padding) for p in pair]).contiguous()
    n_channels = x.shape[1] // geometry.groups
    n_out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    ]
    of_example, of_channel, *of_pixel = x.stride()
    strides = [of_example, n_channels * of_channel, of_channel]
    strides += [d * stride for d, stride in zip(geometry.dilation, of_pixel, strict=True)]
    strides += [s * stride for s, stride in zip(geometry.stride, of_pixel, strict=True)]
    return x.as_strided((len(x), geometry.groups, n_channels, *geometry.kernel, *n_out), strides)


def patch_sum(x: Float[Tensor, "N C *S"], geometry: ConvGeometry) -> Float[Tensor, "*G N I"]:
    """Sum over the output positions of the input patches, without forming them.

    The set of pixels that a tap reads is a product over the axes, so the sum separates: one sum per axis and tap.
    """
    out = x
    for axis in reversed(range(x.ndim - 2)):  # the last axis first: contiguous in memory, and little is left after it
        reads = (_within(read, x.shape[2 + axis]) for read in geometry.taps(axis, x.shape[2 + axis]).tolist())
        sums = [out.movedim(2 + axis, -1)[..., first:end:step].sum(-1) for first, end, step in reads]
        out = torch.stack(sums, 2 + axis)
    sums = out.reshape(len(x), geometry.groups, -1)
    return _groups_first(sums, geometry.groups)


def _within(positions: list[int], size: int) -> tuple[int, int, int]:
    """The positions of a tap that lie in the image, as a slice."""
    inside = [p for p in positions if 0 <= p < size]
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    return (inside[0], inside[-1] + 1, step) if inside else (0, 0, step)


def _groups_first(x: Tensor, groups: int) -> Tensor:
    """Move the group axis, second to last, to the front; leave it out where there is one group."""
    return x.squeeze(-2) if groups == 1 else x.movedim(-2, 0)
