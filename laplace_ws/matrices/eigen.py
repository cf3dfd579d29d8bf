"""Eigenvalues and eigenvectors of positive semi-definite matrices, in the precision that each matrix needs."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.errors import NumericalRepairWarning

_OVERSAMPLING = 10  # random vectors beyond the rank, with which the range is found but for a chance below 1e-10
_THIN_FROM = 256  # rows below which the whole decomposition takes no time


def decomposition_dtype(matrix: Float[Tensor, "*G D D"]) -> torch.dtype:
    """The precision that decomposes a symmetric matrix without losing its positive-definiteness.

    An eigensolver moves each eigenvalue by a few ε·λ_max. Where every eigenvalue exceeds the `rounding` of the matrix, which a Cholesky
    factorisation of F − rounding·I shows at a sixth of the cost of the eigenvalues or less, the matrix's own precision suffices;
    elsewhere the small eigenvalues would be noise, and it is float64. A stack of matrices shares one decision.
    """
    if matrix.dtype == torch.float64:
        return torch.float64
    bound = torch.linalg.matrix_norm(matrix, dtype=torch.float64)  # Frobenius norm: no eigenvalue is larger
    shift = (rounding(matrix.shape[-1], matrix.dtype) * bound)[..., None].to(matrix.dtype)
    # the smallest eigenvalue is not above the smallest entry of the diagonal
    if not (matrix.diagonal(dim1=-2, dim2=-1) > shift).all():
        return torch.float64
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_(shift)
    is_definite = bool((torch.linalg.cholesky_ex(shifted).info == 0).all())
    return matrix.dtype if is_definite else torch.float64


def rounding(n_rows: int, dtype: torch.dtype) -> float:
    """How far an eigenvalue of a matrix with D rows can be off, in units of the largest one: 10·D·ε."""
    return 10 * n_rows * torch.finfo(dtype).eps


def eigh(
    matrix: Float[Tensor, "*G D D"], dtype: torch.dtype, what: str
) -> tuple[Float[Tensor, "*G D"], Float[Tensor, "*G D D"]]:
    """Eigenvalues and eigenvectors of a positive semi-definite matrix, computed in `dtype`; eigenvalues in float64, see `clamped`.

    The divide-and-conquer routine behind torch sometimes fails on wide matrices of low rank; LAPACK's relatively robust
    representations, called through scipy, then take its place.
    """
    working = matrix.to(dtype)
    try:
        values, vectors = torch.linalg.eigh(working)
    except torch.linalg.LinAlgError:  # pyright: ignore
        blocks = working.reshape(-1, *working.shape[-2:]).cpu().numpy()
        pairs = [scipy.linalg.eigh(block, driver="evr") for block in blocks]
        values = torch.from_numpy(np.stack([pair[0] for pair in pairs])).to(working).reshape(working.shape[:-1])
        vectors = torch.from_numpy(np.stack([pair[1] for pair in pairs])).to(working).reshape(working.shape)
    return clamped(values.double(), matrix.dtype, what), vectors


def eigenvalues(matrix: Float[Tensor, "*G D D"], dtype: torch.dtype, what: str) -> Float[Tensor, "*G D"]:
    """Eigenvalues of a positive semi-definite matrix, computed in `dtype`, returned in float64; see `clamped`."""
    try:
        values = torch.linalg.eigvalsh(matrix.to(dtype))
    except torch.linalg.LinAlgError:  # pyright: ignore
        return eigh(matrix, dtype, what)[0]
    return clamped(values.double(), matrix.dtype, what)


def clamped(values: Float[Tensor, "*G D"], dtype: torch.dtype, what: str) -> Float[Tensor, "*G D"]:
    """Set negative eigenvalues to zero; warn when they exceed the `rounding` of a matrix that was made in `dtype`."""
    lowest = values.min().item()
    if -lowest > rounding(values.shape[-1], dtype) * values.abs().max().item():
        message = f"{what} has an eigenvalue of {lowest:.3g} where none can be negative; set to 0."
        warnings.warn(message, NumericalRepairWarning, stacklevel=2)
    return values.clamp_min(0)


def thin_eigh(
    matrix: Float[Tensor, "D D"], rank: int, what: str, *, vectors: bool
) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"] | None] | None:
    """As `eigh`, for a matrix whose rank is perhaps at most `rank`, in time D²·rank in place of D³; None where it is larger.

    The range is found by products with random vectors [Halko et al. 2011], and the eigenvectors are completed to a basis. What lies
    outside of the range is the trace that it does not account for, which also bounds each eigenvalue that would be missed: it must be
    within the `rounding` of the matrix, so that a wrong guess costs time alone.

    Args:
        matrix: a positive semi-definite one.
        rank: a guess.
        what: the matrix is, for messages.
        vectors: whether eigenvectors are wanted.
    """
    size = len(matrix)
    n_columns = rank + _OVERSAMPLING
    if size < _THIN_FROM or 2 * n_columns > size or not matrix.isfinite().all():
        return None
    A = matrix.double()
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(size, n_columns, dtype=torch.float64, generator=generator).to(A.device)
    for _ in range(2):
        Q = torch.linalg.qr(A @ Q).Q
    small = Q.mT @ (A @ Q)
    found, rotation = torch.linalg.eigh((small + small.mT) / 2)
    missed = A.diagonal().sum() - found.sum()
    if not missed.abs() <= rounding(size, matrix.dtype) * found[-1]:
        return None
    values = clamped(torch.cat([found.new_zeros(size - n_columns), found]), matrix.dtype, what)
    if not vectors:
        return values, None
    basis = torch.linalg.qr((Q @ rotation).to(matrix.dtype), mode="complete").Q
    return values, torch.cat([basis[:, n_columns:], basis[:, :n_columns]], dim=1)
