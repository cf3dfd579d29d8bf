"""Sums over the spectrum of a damped Kronecker product, Σ_ij f(r b_i a_j), with b and a the factors' eigenvalues and r = scale/δ.

Most products of a wide block lie far below the damping. Where r b_i a_j stays below `_SMALL` in a whole row or column, f is replaced by
its power series, whose sums factor, Σ_ij (b_i a_j)^k = (Σ b_i^k)(Σ a_j^k): as exact as float64, at the cost of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_SMALL = 1e-3
_N_TERMS = 5  # the truncation error is below _SMALL**5 = 1e-15 of each summand
_ORDERS = torch.arange(1, _N_TERMS + 1, dtype=torch.float64)
_SIGNS = -((-1.0) ** _ORDERS)

MOST_DIRECT = 2**14
"""Below this many products the split costs more than it saves."""


def split(b: Tensor, a: Tensor, ratio: Tensor) -> tuple[tuple[Tensor, Tensor], Sequence[tuple[Tensor, Tensor]]]:
    """The rows and columns to sum product by product, and the rest of the rectangle as pairs for the series."""
    if b.ndim > 1 or min(b.numel(), a.numel()) == 1 or b.numel() * a.numel() < MOST_DIRECT:
        return (b, a), ()
    r = ratio.detach()
    b_is_large, a_is_large = b * (r * a.max()) > _SMALL, a * (r * b.max()) > _SMALL
    b_large, a_large = b[b_is_large], a[a_is_large]
    return (b_large, a_large), ((b[~b_is_large], a), (b_large, a[~a_is_large]))


def sum_log1p(b: Float[Tensor, "*G O"], a: Float[Tensor, "*G I"], ratio: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Σ log(1 + r b a), the log determinant of r·B⊗A + 1; differentiable in r."""
    large, small = split(b, a, ratio)
    series = [_power_series(pair, ratio, _SIGNS / _ORDERS) for pair in small]
    return torch.stack([_products(*large, ratio).log1p().sum(), *series]).sum()


@torch.no_grad()
def effective_parameters(
    b: Float[Tensor, "*G O"], a: Float[Tensor, "*G I"], ratio: Float[Tensor, ""]
) -> Float[Tensor, " 2"]:
    """γ = Σ p with p = r b a/(1 + r b a), and −dγ/dlog δ = Σ p(1 − p)."""
    large, small = split(b, a, ratio)
    x = _products(*large, ratio)
    p = x.div_(x + 1).flatten()
    total = torch.stack([p.sum(), p.sum() - p.dot(p)])
    for pair in small:
        total[0] += _power_series(pair, ratio, _SIGNS)
        total[1] += _power_series(pair, ratio, _SIGNS * _ORDERS)
    return total


def _products(b: Tensor, a: Tensor, ratio: Tensor) -> Float[Tensor, "*G O I"]:
    return (b * ratio)[..., :, None] * a[..., None, :]


def _power_series(pair: tuple[Tensor, Tensor], ratio: Tensor, coefficients: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """Σ_k c_k r^k Σ_ij (b_i a_j)^k."""
    moments = [v.expand(_N_TERMS, -1).cumprod(0).sum(1) for v in pair]
    powers = ratio.expand(_N_TERMS).cumprod(0)
    return (coefficients.to(ratio.device) * moments[0] * moments[1] * powers).sum()
