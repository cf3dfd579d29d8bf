"""Rows of a Jacobian over one parameter tensor in forms that are smaller than the rows themselves."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class OuterProducts:
    """K rows for each of N examples that are sums of outer products over R positions, Σ_r g_r a_rᵀ.

    A row is the matrices `[O, I]` of its G groups, flattened.

    Attributes:
        g: vectors over the outputs, `[G, N, K, R, O]`.
        a: vectors over the inputs, `[G, N, R, I]`.
    """

    g: Float[Tensor, "G N K R O"]
    a: Float[Tensor, "G N R I"]

    @property
    def entries_per_output(self) -> int:
        """Entries of all rows that belong to one output."""
        n_groups, n, k = self.g.shape[:3]
        return n_groups * n * k * self.a.shape[-1]

    def whole(self) -> Float[Tensor, "N K D"]:
        """The rows."""
        return self.of_outputs(0, self.g.shape[-1]).movedim(0, 2).flatten(2)

    def of_outputs(self, start: int, end: int) -> Float[Tensor, "G N K O I"]:
        """The part of the rows that belongs to some of the outputs."""
        g = self.g[..., start:end]
        products = g.mT.flatten(2, 3) @ self.a  # [G, N, K·O, I]
        return products.unflatten(2, (g.shape[2], g.shape[-1]))


@dataclass(frozen=True, eq=False)
class Lookups:
    """K rows for each of N examples that are zero but for M of the vectors in a table.

    Attributes:
        g: the vectors over the outputs, `[N, K, M, O]`; those of one example have different indices, or are zero.
        index: of each, `[N, M]`.
        n_indices: V, those of the table.
        outputs_last: whether a row is the table `[V, O]`, flattened, or `[O, V]`.
    """

    g: Float[Tensor, "N K M O"]
    index: Int[Tensor, "N M"]
    n_indices: int
    outputs_last: bool

    def whole(self) -> Float[Tensor, "N K D"]:
        """The rows."""
        n, k, _, n_outputs = self.g.shape
        index = self.index[:, None, :, None].expand_as(self.g)
        table = self.g.new_zeros(n, k, self.n_indices, n_outputs).scatter_add(2, index, self.g)
        return (table if self.outputs_last else table.mT).flatten(2)

    def entries(self, values: Float[Tensor, " D"]) -> Float[Tensor, "N M O"]:
        """The entries of one vector like a row that belong to the vectors."""
        n_outputs = self.g.shape[-1]
        if self.outputs_last:
            return values.reshape(self.n_indices, n_outputs)[self.index]
        return values.reshape(n_outputs, self.n_indices).T[self.index]
