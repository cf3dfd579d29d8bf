"""Laplace posteriors by structure, and `Laplace`, which makes the one that is asked for."""

from __future__ import annotations

from typing import Any

from torch import nn

from laplace_ws.likelihoods import Likelihood
from laplace_ws.posterior.base import BaseLaplace
from laplace_ws.posterior.diag import DiagLaplace
from laplace_ws.posterior.full import FullLaplace
from laplace_ws.posterior.groups import PriorGroups, PriorStructure, prior_groups
from laplace_ws.posterior.kron import KronLaplace, KronPrecision

STRUCTURES: dict[str, type[BaseLaplace]] = {
    cls.hessian_structure: cls for cls in (KronLaplace, DiagLaplace, FullLaplace)
}


def Laplace(
    model: nn.Module,
    likelihood: str | Likelihood,
    subset_of_weights: str = "all",
    hessian_structure: str = "kron",
    **options: Any,
) -> BaseLaplace:
    """Make a Laplace posterior.

    Args:
        model: a trained network.
        likelihood: "classification", "regression", "binary" or a `Likelihood`.
        subset_of_weights: "all": every parameter that requires grad; freeze the others (`requires_grad_(False)`).
        hessian_structure: "kron", "diag" or "full".
        **options: see `BaseLaplace`; `kfac_approx` with "kron".
    """
    if subset_of_weights != "all":
        raise ValueError(
            f"unknown subset_of_weights {subset_of_weights!r}: choose 'all', and freeze the parameters that the posterior is not to "
            "cover (requires_grad_(False))."
        )
    if hessian_structure not in STRUCTURES:
        raise ValueError(
            f"unknown hessian_structure {hessian_structure!r}: choose one of {', '.join(map(repr, STRUCTURES))}."
        )
    return STRUCTURES[hessian_structure](model, likelihood, **options)


__all__ = [
    "BaseLaplace",
    "DiagLaplace",
    "FullLaplace",
    "KronLaplace",
    "KronPrecision",
    "Laplace",
    "PriorGroups",
    "PriorStructure",
    "prior_groups",
]
