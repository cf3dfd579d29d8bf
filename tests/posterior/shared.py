"""What the tests of posteriors share: fits of the cases, and their posteriors in dense algebra."""

from __future__ import annotations

import torch
from cases import CASES, Case
from torch import Tensor

from laplace_ws import Laplace
from laplace_ws.curvature import exact
from laplace_ws.posterior import BaseLaplace

STRUCTURES = ["kron", "ekfac", "diag", "full", "lowrank"]


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def fitted(structure: str, case: Case | str = "mlp", **options) -> tuple[BaseLaplace, Tensor, Tensor]:
    case = case_of(case) if isinstance(case, str) else case
    model, x, y = case.make()
    la = Laplace(model, case.likelihood, hessian_structure=structure, **options)
    la.fit([(x, y)])
    return la, x, y


def dense_covariance(la: BaseLaplace) -> Tensor:
    """(H/τ + Δ)⁻¹ over all covered weights."""
    scale, _ = la._damping
    return torch.linalg.inv(la.H.to_dense() * scale + torch.diag(la.prior_precision_diag))


def dense_moments(la: BaseLaplace, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `[N, D]` and their covariance `[N, D, N, D]`, from the whole Jacobian of all weights that require grad."""
    J = exact.jacobian(la.model, x)
    with torch.no_grad():
        f = la.model.eval()(x)
    return f.reshape(len(x), -1), torch.einsum("ndp,pq,meq->ndme", J, dense_covariance(la), J)
