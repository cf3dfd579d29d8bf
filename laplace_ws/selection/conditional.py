"""log p(D_rest | D_part) of a Gaussian posterior given the part, through the linearised network."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.likelihoods import Likelihood
from laplace_ws.likelihoods.links import root

_TOLERANCE = 1e-8
_MOST_STEPS = 100
_SHORTEST_STEP = 2.0**-30


def log_joint_predictive(
    likelihood: Likelihood, f: Float[Tensor, "N C"], covariance: Float[Tensor, "NC NC"], y: Tensor
) -> float:
    """log ∫ p(y | g) N(g; f, K) dg in nats, all examples together, by Laplace's approximation at the best outputs g.

    With K = L Lᵀ and g = f + L v it is −L(g) − ½ ‖v‖² − ½ log det(I + Lᵀ Λ L) at the v that minimises the first two terms, where L(g) is
    the negative log likelihood and Λ its Hessian in the outputs. Newton's method finds it, as the likelihood is log-concave in the outputs.
    Exact for a Gaussian likelihood.

    Args:
        likelihood: of the targets, with one loss term per example.
        f: mean of the outputs.
        covariance: K, of the outputs of all examples.
        y: targets.

    Source: Rasmussen & Williams 2006, sections 3.4 and 3.5, for the covariance of a Laplace posterior in place of a kernel.
    """
    f, L = f.double(), root(covariance).double()
    v = torch.zeros_like(L[0])

    def objective(v: Tensor) -> float:
        return (likelihood.nll_sum(outputs(v), y) + 0.5 * v.dot(v)).item()

    def outputs(v: Tensor) -> Float[Tensor, "N C"]:
        return f + (L @ v).reshape(f.shape)

    value = objective(v)
    for _ in range(_MOST_STEPS):
        g = outputs(v)
        gradient = L.mT @ likelihood.gradient_column(g, y).flatten() + v
        factor = torch.linalg.cholesky(_precision(likelihood, g, L))
        step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        decrement = gradient.dot(step).item()
        if decrement <= _TOLERANCE:
            return -value - factor.diagonal().log().sum().item()
        size = 1.0
        while not (after := objective(v - size * step)) <= value - 0.25 * size * decrement and size > _SHORTEST_STEP:
            size *= 0.5
        v, value = v - size * step, after
    return math.nan


def _precision(likelihood: Likelihood, g: Float[Tensor, "N C"], L: Float[Tensor, "NC D"]) -> Float[Tensor, "D D"]:
    """I + Lᵀ Λ L."""
    precision = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    for column in likelihood.hessian_columns(g):
        rows = torch.einsum("nc,ncd->nd", column, L.reshape(*g.shape, -1))
        precision += rows.mT @ rows
    return precision
