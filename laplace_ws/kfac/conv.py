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
    """Shape of a convolution, one entry a spatial axis.

    Attributes:
        kernel: kernel sizes.
        stride: strides.
        padding: zeros added (before, after) an axis.
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
        dilations = _per_axis(dilation, len(kernel))
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
            pads = tuple((total // 2, total - total // 2) for total in totals)  # torch puts the odd zero after
        elif isinstance(padding, str):  # "valid"
            pads = ((0, 0),) * len(kernel)
        else:
            pads = tuple((p, p) for p in _per_axis(padding, len(kernel)))
        return cls(kernel, _per_axis(stride, len(kernel)), pads, dilations, groups)

    def taps(self, axis: int, size: int) -> Int[Tensor, "K out"]:
        """Position that tap k reads for each output along `axis` of length `size`; outside 0 … size−1 lies padding."""
        k, s, d = self.kernel[axis], self.stride[axis], self.dilation[axis]
        before, after = self.padding[axis]
        n_out = (size + before + after - d * (k - 1) - 1) // s + 1
        return (torch.arange(k) * d - before)[:, None] + torch.arange(n_out) * s


def _per_axis(value: int | tuple[int, ...], n_axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n_axes if len(values) == 1 else values


def n_positions(geometry: ConvGeometry, size: tuple[int, ...]) -> int:
    """Number of output positions of a convolution over an image of spatial `size`."""
    return prod(geometry.taps(axis, length).shape[1] for axis, length in enumerate(size))


def patches(x: Float[Tensor, "N C *S"], geometry: ConvGeometry) -> Float[Tensor, "*G N R I"]:
    """Input patch of each output position (im2col), with a leading group axis where there are groups.

    I runs over (channel in group, *kernel) row-major, as `weight.flatten(1)` does. The slow path, and the oracle of the fast ones.
    """
    n_axes = len(geometry.kernel)
    out = F.pad(x, [p for pair in reversed(geometry.padding) for p in pair])
    for axis in range(n_axes):
        dim = 2 + 2 * axis  # the axes already treated are (tap, output) pairs
        index = (geometry.taps(axis, x.shape[2 + axis]) + geometry.padding[axis][0]).to(x.device)
        out = out.index_select(dim, index.flatten()).unflatten(dim, index.shape)
    taps, outputs = range(2, 2 + 2 * n_axes, 2), range(3, 3 + 2 * n_axes, 2)
    out = out.permute(0, *outputs, 1, *taps)  # [N, *out, C, *K]
    rows = out.reshape(len(x), -1, geometry.groups, x.shape[1] // geometry.groups * prod(geometry.kernel))
    return _groups_first(rows, geometry.groups)


def patch_sum(x: Float[Tensor, "N C *S"], geometry: ConvGeometry) -> Float[Tensor, "*G N I"]:
    """Sum over the output positions of the input patches, without forming them.

    The set of positions that a tap reads is a product over the axes, so the sum separates into one small matrix
    product an axis: `Σ_h Σ_w x[c, h, w] P[h, k] Q[w, l]` with P[h, k] the number of outputs for which tap k reads row h.
    """
    out = x
    for axis, size in enumerate(x.shape[2:]):
        taps = geometry.taps(axis, size)
        reads = (taps[None] == torch.arange(size)[:, None, None]).sum(-1).to(x)  # [size, K]
        out = out.movedim(2, -1) @ reads  # the treated axis moves last: [N, C, *rest, K]
    sums = out.reshape(len(x), geometry.groups, -1)
    return _groups_first(sums, geometry.groups)


def _groups_first(x: Tensor, groups: int) -> Tensor:
    """Move the group axis, second to last, to the front; leave it out where there is one group."""
    return x.squeeze(-2) if groups == 1 else x.movedim(-2, 0)
