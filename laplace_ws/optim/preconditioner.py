"""The damped inverses of Kronecker factors, and what they make of a gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_MOST_TRIES = 5


def damped_inverse(factor: Float[Tensor, "*G D D"] | Float[Tensor, " D"], damping: float, is_diagonal: bool) -> Tensor:
    """(X + λ·(tr X / D)·I)⁻¹, of a diagonal its diagonal; the identity for a factor that is zero.

    Where rounding leaves the damped factor indefinite, λ is raised tenfold until it is not.

    Raises:
        FloatingPointError: the factor has entries that are not finite.
    """
    diagonal = factor if is_diagonal else factor.diagonal(dim1=-2, dim2=-1)
    size = diagonal.mean(-1, keepdim=True)
    if not bool(torch.isfinite(size).all()):
        raise FloatingPointError("a Kronecker factor is not finite")
    size = torch.where(size > 0, size, torch.ones_like(size))
    if is_diagonal:
        return 1 / (factor + damping * size)
    for _ in range(_MOST_TRIES):
        damped = factor.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping * size)
        root, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            return torch.cholesky_inverse(root)
        damping *= 10
    raise FloatingPointError(f"a Kronecker factor is indefinite even with a damping of {damping / 10:g}")


def precondition(
    matrix: Float[Tensor, "*G O J"], inv_A: Tensor | None, inv_B: Tensor | None, *, diagonal_A: bool
) -> Float[Tensor, "*G O J"]:
    """B⁻¹ M A⁻¹; an inverse that is None counts as the identity."""
    if inv_B is not None:
        matrix = inv_B @ matrix
    if inv_A is None:
        return matrix
    return matrix * inv_A if diagonal_A else matrix @ inv_A
