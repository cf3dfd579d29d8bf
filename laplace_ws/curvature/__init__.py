"""Curvature of a model's negative log likelihood: backends that run the model, and sums over the data."""

from laplace_ws.curvature.backend import Backend, Linearisation
from laplace_ws.curvature.compute import (
    BACKENDS,
    Curvature,
    CurvatureSum,
    jacobians,
    kron_factors,
    make_backend,
    parse_curvature,
)
from laplace_ws.curvature.lowrank import LowRankFit, low_rank_curvature
from laplace_ws.curvature.native import NativeBackend
from laplace_ws.curvature.products import CurvatureProducts

__all__ = [
    "BACKENDS",
    "Backend",
    "Curvature",
    "CurvatureProducts",
    "CurvatureSum",
    "Linearisation",
    "LowRankFit",
    "NativeBackend",
    "jacobians",
    "kron_factors",
    "low_rank_curvature",
    "make_backend",
    "parse_curvature",
]
