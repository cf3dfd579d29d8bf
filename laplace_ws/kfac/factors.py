"""The factors of K-FAC, as sums over data: one routine for every backend, layer and approximation.

Canonical form of one use of a layer: inputs a `[*G, N, R, I]`, back-propagated columns g `[*G, K, N, R, O]`, with N examples, R sharing
positions, K columns, and, only for convolutions with channel groups and packed projections, a leading axis G of groups (each group is a
layer of its own). In the notation of Eschenhagen et al. 2023, K-FAC-expand has the factors Σ_n Σ_r a aᵀ and Σ_c Σ_n Σ_r g gᵀ, and
K-FAC-reduce Σ_n ā āᵀ and Σ_c Σ_n (Σ_r g)(Σ_r g)ᵀ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.registry import Choice
from laplace_ws.threads import SharedSetting

SHORTEST_PRODUCT = 256
"""Positions of an example below which products are taken over all examples at once."""
ROWS_OF_A_BLOCK = 2048
"""Rows that `gram` adds up at once."""


class FactorPrecision(Choice):
    """The precision in which the products that make up factors of float32 networks are computed; sums are always float32.

    `FLOAT32`: as torch is set. `TF32`: inputs with 10 bits of mantissa, on GPUs that have it; elsewhere float32. `BF16`: inputs with 7
    bits; saves time on GPUs only.
    """

    FLOAT32 = "float32"
    TF32 = "tf32"
    BF16 = "bf16"


_precision: ContextVar[FactorPrecision] = ContextVar("precision of products", default=FactorPrecision.FLOAT32)


@contextmanager
def products_in(precision: FactorPrecision) -> Iterator[None]:
    """Compute the products within this context in the given precision."""
    token = _precision.set(precision)
    try:
        with _tf32() if precision is FactorPrecision.TF32 else nullcontext():
            yield
    finally:
        _precision.reset(token)


@contextmanager
def _allowing_tf32() -> Iterator[None]:
    """Allow TF32 in matrix products."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


_tf32 = SharedSetting(_allowing_tf32)


def _product(a: Float[Tensor, "*B C M"], b: Float[Tensor, "*B D M"]) -> Float[Tensor, "*B C D"]:
    """a bᵀ in the precision of the context."""
    if _precision.get() is not FactorPrecision.BF16 or a.dtype is not torch.float32:
        return a @ b.mT
    a, b = a.bfloat16(), b.bfloat16()
    if not a.is_cuda:
        return a.float() @ b.float().mT
    batch = a.shape[:-2]
    wide = torch.bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]).mT, out_dtype=torch.float32)
    return wide.reshape(*batch, *wide.shape[-2:])


def total(tensors: Iterable[Any]) -> Any:
    """Sum of one or more tensors (or numbers) of the same shape."""
    return reduce(add, tensors)


def gram(rows: Float[Tensor, "*G M D"]) -> Float[Tensor, "*G D D"]:
    """Σ_m r_m r_mᵀ over the second to last axis."""
    return _long_product(rows.mT, rows.mT)


def cross_gram(a: Float[Tensor, "N G C L"], b: Float[Tensor, "N G D L"]) -> Float[Tensor, "G C D"]:
    """Σ_n Σ_l a_nl b_nlᵀ, for positions that lie last."""
    if a.shape[-1] < SHORTEST_PRODUCT:
        a, b = (t.permute(1, 2, 0, 3).flatten(2) for t in (a, b))
        return _long_product(a, b)
    if (
        a.shape[1] == 1 and a.device.type == "cpu" and _precision.get() is not FactorPrecision.BF16
    ):  # sums over the examples in place
        return torch.addbmm(a.new_zeros(()).expand(a.shape[2], b.shape[2]), a[:, 0], b[:, 0].mT, beta=0)[None]
    return total(_product(a_part, b_part).sum(0) for a_part, b_part in _parts(a, b))


def accumulated(sums: Tensor | None, term: Tensor) -> Tensor:
    """Add in place to sums, which may not exist yet."""
    return term.contiguous() if sums is None else sums.add_(term)


def add_gram(sums: Float[Tensor, "*G D D"] | None, rows: Float[Tensor, "*G M D"]) -> Float[Tensor, "*G D D"]:
    """`gram` added in place to sums, without a temporary of their size where the rows are few."""
    is_rounded = _precision.get() is FactorPrecision.BF16
    if sums is None or is_rounded or rows.ndim > 2 or len(rows) >= 2 * ROWS_OF_A_BLOCK or rows.dtype != sums.dtype:
        return accumulated(sums, gram(rows))
    return sums.addmm_(rows.mT, rows)


def _long_product(a: Float[Tensor, "*G C M"], b: Float[Tensor, "*G D M"]) -> Float[Tensor, "*G C D"]:
    """a bᵀ, with long sums taken in blocks.

    A matrix product that adds 65,536 short rows in single precision is accurate only to 4e-5.
    """
    n_blocks = a.shape[-1] // ROWS_OF_A_BLOCK
    if n_blocks < 2 or b.shape[-2] > ROWS_OF_A_BLOCK:  # the blocks' products would take more memory than the rows
        return _product(a, b)
    n_rows = n_blocks * ROWS_OF_A_BLOCK
    a_blocks, b_blocks = (t[..., :n_rows].unflatten(-1, (n_blocks, ROWS_OF_A_BLOCK)).movedim(-2, -3) for t in (a, b))
    return _product(a_blocks, b_blocks).sum(-3) + _product(a[..., n_rows:], b[..., n_rows:])


def _parts(a: Tensor, b: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Chunks of examples whose products take no more memory than the examples themselves."""
    at_once = max(1, len(a) * a.shape[-1] // (2 * b.shape[-2]))
    return zip(a.split(at_once), b.split(at_once), strict=True)


def mean_over_positions(
    sums: Sequence[Float[Tensor, "*G N I"]], n_positions: int | Int[Tensor, "*G N"]
) -> Float[Tensor, "*G N I"]:
    """ā of each example, the mean of its inputs over the positions of all uses; zero for an example without positions.

    Σ_n ā āᵀ, divided by N, is the input factor of K-FAC-reduce [Eschenhagen et al. 2023].

    Args:
        sums: for each use of the weight, its inputs summed over the positions of the use.
        n_positions: number of positions of each example, over all uses.
    """
    if isinstance(n_positions, Tensor):
        return total(sums) / n_positions.clamp(min=1)[..., None]
    return total(sums) / n_positions
