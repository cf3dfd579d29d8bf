"""What the tests of posteriors share: fits of the cases, and their posteriors in dense algebra."""

from __future__ import annotations

import torch
from cases import CASES, Case
from torch import Tensor

from laplace_ws import Laplace
from laplace_ws.curvature import exact
from laplace_ws.curvature.batches import Batches
from laplace_ws.posterior.validate import grid_scores

STRUCTURES = ["kron", "ekfac", "diag", "full", "lowrank"]


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def fitted(structure: str, case: Case | str = "mlp", **options) -> tuple[Laplace, Tensor, Tensor]:
    case = case_of(case) if isinstance(case, str) else case
    model, x, y = case.make()
    la = Laplace(model, case.likelihood, hessian_structure=structure, **options)
    la.fit([(x, y)])
    return la, x, y


def dense_covariance(la: Laplace) -> Tensor:
    """(H/τ + Δ)⁻¹ over all covered weights."""
    scale, _ = la.fitted.damping(la.prior)
    return torch.linalg.inv(la.H.to_dense() * scale + torch.diag(la.prior_precision_diag))


def dense_moments(la: Laplace, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `[N, D]` and their covariance `[N, D, N, D]`, from the whole Jacobian of all weights that require grad."""
    J = exact.jacobian(la.model, x)
    with torch.no_grad():
        f = la.model.eval()(x)
    return f.reshape(len(x), -1), torch.einsum("ndp,pq,meq->ndme", J, dense_covariance(la), J)


def scores_of_grid(la: Laplace, data, grid, score, options) -> list[float]:
    """The scores by which `optimize_prior_precision("gridsearch")` chooses."""
    return grid_scores(la.predictor, Batches.of(data, la.model), grid, score, options)
