"""The use of several weights that are stacked, each on inputs of its own."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from laplace_ws.kfac.factors import gram
from laplace_ws.kfac.uses import LinearUse, at_least_float32


@dataclass(frozen=True, kw_only=True)
class GroupedLinearUse(LinearUse):
    """y_g = W_g a_g with x `[B, ..., G, I]` and outputs `[B, ..., G, O]`, as `torch.bmm` and `torch.einsum` have it of a W `[G, ...]`."""

    n_groups: int

    @property
    def groups(self) -> int:  # type: ignore[override]
        """G."""
        return self.n_groups

    @property
    def n_positions(self) -> int | Tensor:
        """See `MatrixUse.n_positions`."""
        return self.rows.counts * self.x.shape[1:-2].numel()

    def inputs(self) -> Tensor:
        """See `MatrixUse.inputs`."""
        return self.rows.group(_by_group(self.x, 0), 1).flatten(2, 3)

    def input_sum(self) -> Tensor:
        """See `MatrixUse.input_sum`."""
        return self.rows.sum(_by_group(self.x, 0).sum(2), 1)

    def input_gram(self) -> Tensor:
        """See `MatrixUse.input_gram`."""
        return gram(_by_group(self.x, 0).flatten(1, 2))

    def output_gradients(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradients`."""
        return self.rows.group(_by_group(g, 1), 2).flatten(3, 4)

    def output_gradient_sum(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradient_sum`."""
        return self.rows.sum(_by_group(g, 1).sum(3), 2)

    def output_gradient_gram(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradient_gram`."""
        return gram(_by_group(g, 1).flatten(1, 3))


def _by_group(x: Float[Tensor, "... B *q G D"], batch_axis: int) -> Float[Tensor, "G ... B q D"]:
    """Groups first, and the axes between the batch and the groups as one."""
    x = at_least_float32(x).movedim(-2, 0)
    batch_axis += 1
    return x.flatten(batch_axis + 1, -2) if x.ndim > batch_axis + 2 else x.unsqueeze(batch_axis + 1)
