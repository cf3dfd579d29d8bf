"""Laplace posteriors: `Laplace`, and the parts that it is made of."""

from laplace_ws.posterior import structures  # noqa: F401 - registers them
from laplace_ws.posterior.evidence import log_marginal_likelihood
from laplace_ws.posterior.fit import Fit
from laplace_ws.posterior.groups import PriorGroups, PriorStructure, prior_groups
from laplace_ws.posterior.laplace import Laplace
from laplace_ws.posterior.load import (
    DiagLaplace,
    EkfacLaplace,
    FullLaplace,
    KronLaplace,
    LowRankLaplace,
    load_posterior,
)
from laplace_ws.posterior.precision import PosteriorPrecision
from laplace_ws.posterior.prior import Prior
from laplace_ws.posterior.structure import STRUCTURES, Structure, register_structure
from laplace_ws.posterior.subset import WeightSubset

__all__ = [
    "STRUCTURES",
    "DiagLaplace",
    "EkfacLaplace",
    "Fit",
    "FullLaplace",
    "KronLaplace",
    "Laplace",
    "LowRankLaplace",
    "PosteriorPrecision",
    "Prior",
    "PriorGroups",
    "PriorStructure",
    "Structure",
    "WeightSubset",
    "load_posterior",
    "log_marginal_likelihood",
    "prior_groups",
    "register_structure",
]
