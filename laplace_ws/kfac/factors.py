"""The factors of K-FAC, as sums over data: one routine for every backend, layer and approximation.

Canonical form of one use of a layer: inputs a `[*G, N, R, I]`, back-propagated columns g `[*G, K, N, R, O]`, with N examples, R sharing
positions, K columns, and, for convolutions with channel groups and packed projections alone, a leading axis G of groups (each group is a
layer of its own).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

ROWS_OF_A_BLOCK = 2048
"""Rows that `gram` adds up at once."""


def total(tensors: Iterable[Any]) -> Any:
    """Sum of one tensor (or number) or more of one shape."""
    return reduce(add, tensors)


def gram(rows: Float[Tensor, "*G M D"]) -> Float[Tensor, "*G D D"]:
    """Σ_m r_m r_mᵀ over the second to last axis.

    Long sums are taken in blocks: a matrix product that adds 65,536 short rows in single precision is right to 4e-5 only.
    """
    n_blocks = rows.shape[-2] // ROWS_OF_A_BLOCK
    if n_blocks < 2 or rows.shape[-1] > ROWS_OF_A_BLOCK:  # the blocks' products would take more memory than the rows
        return rows.mT @ rows
    n_rows = n_blocks * ROWS_OF_A_BLOCK
    blocks = rows[..., :n_rows, :].unflatten(-2, (n_blocks, ROWS_OF_A_BLOCK))
    rest = rows[..., n_rows:, :]
    return (blocks.mT @ blocks).sum(-3) + rest.mT @ rest


def input_gram_expand(a: Float[Tensor, "*G N R I"]) -> Float[Tensor, "*G I I"]:
    """Σ_n Σ_r a aᵀ; divided by the number of positions, the input factor of K-FAC-expand [Eschenhagen et al. 2023]."""
    return gram(a.flatten(-3, -2))


def gradient_gram_expand(g: Float[Tensor, "*G K N R O"]) -> Float[Tensor, "*G O O"]:
    """Σ_c Σ_n Σ_r g gᵀ, the gradient factor of K-FAC-expand."""
    return gram(g.flatten(-4, -2))


def input_gram_reduce(
    a_sums: Sequence[Float[Tensor, "*G N I"]], n_positions: int | Int[Tensor, "*G N"]
) -> Float[Tensor, "*G I I"]:
    """Σ_n ā āᵀ with ā the mean over the positions of all uses; divided by N, the input factor of K-FAC-reduce.

    Args:
        a_sums: for each use of the weight, its inputs summed over the positions of the use.
        n_positions: number of positions of an example, all uses together; the mean of an example without any is zero.
    """
    if isinstance(n_positions, Tensor):
        return gram(total(a_sums) / n_positions.clamp(min=1)[..., None])
    return gram(total(a_sums) / n_positions)


def gradient_gram_reduce(g_sums: Sequence[Float[Tensor, "*G K N O"]]) -> Float[Tensor, "*G O O"]:
    """Σ_c Σ_n (Σ_r g)(Σ_r g)ᵀ, r over the positions of all uses: the gradient factor of K-FAC-reduce."""
    return gram(total(g_sums).flatten(-3, -2))
