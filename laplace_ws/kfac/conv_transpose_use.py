"""The use of a transposed convolution's weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from laplace_ws.kfac.conv import ConvGeometry, n_positions, patch_sum, patches
from laplace_ws.kfac.conv_use import ConvUse
from laplace_ws.kfac.uses import at_least_float32


@dataclass(frozen=True, kw_only=True)
class ConvTransposeUse(ConvUse):
    """`conv_transpose1d/2d/3d(x, W, b)` with x `[B, C, *S]` and W `[C, O, *K]`; the positions are the pixels of the output.

    It is the convolution of x, with zeros put between its pixels, by the kernel backwards; so inputs and output gradients are as for
    convolutions. `geometry` is that of this convolution.

    Attributes:
        stride: of the transposed convolution; stride − 1 zeros lie between two pixels.
    """

    stride: tuple[int, ...]
    output_axes: tuple[int, ...] = (1,)

    @property
    def plan(self) -> None:  # type: ignore[override]
        """None: patches are formed."""
        return None

    @property
    def n_positions(self) -> int | Tensor:
        """See `MatrixUse.n_positions`."""
        size = tuple(s * (n - 1) + 1 for n, s in zip(self.x.shape[2:], self.stride, strict=True))
        return self.rows.counts * n_positions(self.geometry, size)

    @cached_property
    def _spread(self) -> Float[Tensor, "B C *S"]:
        """x with the zeros in between."""
        x = at_least_float32(self.x)
        size = [s * (n - 1) + 1 for n, s in zip(x.shape[2:], self.stride, strict=True)]
        out = x.new_zeros(*x.shape[:2], *size)
        out[(..., *(slice(None, None, s) for s in self.stride))] = x
        return out

    def inputs(self) -> Tensor:
        """See `MatrixUse.inputs`."""
        a = self._backwards(patches(self._spread, self.geometry))  # [*G, B, R, I]
        return self.rows.group(a, a.ndim - 3).flatten(-3, -2)

    def input_sum(self) -> Tensor:
        """See `MatrixUse.input_sum`."""
        a = self._backwards(patch_sum(self._spread, self.geometry))  # [*G, B, I]
        return self.rows.sum(a, a.ndim - 2)

    def input_gram(self) -> Tensor:
        """See `MatrixUse.input_gram`; forms the patches."""
        a = self.inputs().flatten(-3, -2)
        return a.mT @ a

    def _backwards(self, a: Float[Tensor, "... I"]) -> Float[Tensor, "... I"]:
        """Patches with the taps in the order of W's."""
        kernel = self.geometry.kernel
        return a.unflatten(-1, (-1, *kernel)).flip(tuple(range(-len(kernel), 0))).flatten(-len(kernel) - 1)


def transposed_geometry(
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> ConvGeometry:
    """That of the convolution which a transposed convolution with W `[C, O, *K]` is, of the input with zeros in between."""
    kernel = tuple(weight.shape[2:])
    around = [d * (k - 1) - p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    pads = tuple((n, n + extra) for n, extra in zip(around, output_padding, strict=True))
    return ConvGeometry(kernel, (1,) * len(kernel), pads, dilation, groups)
