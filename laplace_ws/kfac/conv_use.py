"""The use of a convolution's weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from laplace_ws.kfac.conv import ConvGeometry, n_positions, patch_columns, patch_sum, patches
from laplace_ws.kfac.conv_gram import Plan, cheapest_plan
from laplace_ws.kfac.factors import cross_gram
from laplace_ws.kfac.uses import MatrixUse, Use, at_least_float32, positions


@dataclass(frozen=True, kw_only=True)
class ConvUse(MatrixUse):
    """`conv1d/2d/3d(x, W, b)` with x `[B, C, *S]`; the positions are the pixels of the output."""

    x: Float[Tensor, "B C *S"]
    geometry: ConvGeometry

    def without_inputs(self) -> Use:
        """See `Use.without_inputs`."""
        return replace(self, x=self.x.new_empty(0))

    def magnitudes(self) -> Use:
        """See `Use.magnitudes`."""
        return replace(self, x=self.x.abs())

    @property
    def groups(self) -> int:  # type: ignore[override]
        """Number of channel groups."""
        return self.geometry.groups

    @property
    def n_positions(self) -> int | Tensor:
        """See `MatrixUse.n_positions`."""
        return self.rows.counts * n_positions(self.geometry, tuple(self.x.shape[2:]))

    def inputs(self) -> Tensor:
        """See `MatrixUse.inputs`."""
        a = patches(at_least_float32(self.x), self.geometry)  # [*G, B, R, I]
        return self.rows.group(a, a.ndim - 3).flatten(-3, -2)

    def input_sum(self) -> Tensor:
        """See `MatrixUse.input_sum`."""
        a = patch_sum(at_least_float32(self.x), self.geometry)  # [*G, B, I]
        return self.rows.sum(a, a.ndim - 2)

    def input_gram(self) -> Tensor:
        """See `MatrixUse.input_gram`; forms the patches."""
        a = patch_columns(at_least_float32(self.x), self.geometry)
        return _without_single_group(cross_gram(a, a))

    def input_squares(self) -> Tensor:
        """See `MatrixUse.input_squares`; a patch of the squares of x holds the squares of the patch."""
        return replace(self, x=at_least_float32(self.x).square()).input_sum().sum(-2)

    @property
    def plan(self) -> Plan | None:
        """How to sum `input_gram` over batches without patches; None where patches are cheaper."""
        return cheapest_plan(self.geometry, self.x.shape)

    def output_gradients(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradients`."""
        g = positions(self.rows, g.flatten(3).transpose(2, 3))  # [K, N, R, G·O]
        return g if self.groups == 1 else g.unflatten(-1, (self.groups, -1)).movedim(-2, 0)

    def output_gradient_sum(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradient_sum`; sums in the layout that g has."""
        sums = self.rows.sum(at_least_float32(g).sum(tuple(range(3, g.ndim))), 1)  # [K, N, G·O]
        return sums if self.groups == 1 else sums.unflatten(-1, (self.groups, -1)).movedim(-2, 0)

    def output_gradient_gram(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradient_gram`."""
        return self._gram_by_group(g, self.groups)

    def bias_gradient_gram(self, g: Tensor) -> Tensor:
        """See `MatrixUse.bias_gradient_gram`."""
        return self._gram_by_group(g, 1)

    def _gram_by_group(self, g: Tensor, groups: int) -> Tensor:
        pixels = at_least_float32(g).flatten(0, 1).flatten(2).unflatten(1, (groups, -1))  # [K·B, G, O, pixels]
        return _without_single_group(cross_gram(pixels, pixels))


def _without_single_group(x: Float[Tensor, "G C D"]) -> Float[Tensor, "*G C D"]:
    return x[0] if len(x) == 1 else x
