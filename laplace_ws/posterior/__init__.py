"""Laplace posteriors by structure, and `Laplace`, which makes the one that is asked for."""

from laplace_ws.posterior.base import BaseLaplace
from laplace_ws.posterior.diag import DiagLaplace
from laplace_ws.posterior.ekfac import EkfacLaplace
from laplace_ws.posterior.full import FullLaplace
from laplace_ws.posterior.groups import PriorGroups, PriorStructure, prior_groups
from laplace_ws.posterior.kron import KronLaplace
from laplace_ws.posterior.lowrank import LowRankLaplace
from laplace_ws.posterior.precision import PosteriorPrecision
from laplace_ws.posterior.structures import STRUCTURES, Laplace, load_posterior
from laplace_ws.posterior.subset import WeightSubset

__all__ = [
    "STRUCTURES",
    "BaseLaplace",
    "DiagLaplace",
    "EkfacLaplace",
    "FullLaplace",
    "KronLaplace",
    "Laplace",
    "LowRankLaplace",
    "PosteriorPrecision",
    "PriorGroups",
    "PriorStructure",
    "WeightSubset",
    "load_posterior",
    "prior_groups",
]
