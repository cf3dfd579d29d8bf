"""Curvature of a model's negative log likelihood: backends that run the model, and sums over the data."""

from laplace_ws.curvature.backend import Backend, Linearisation
from laplace_ws.curvature.backends import BACKENDS, FACTOR_BACKENDS, make_backend, register_backend
from laplace_ws.curvature.columns import Curvature
from laplace_ws.curvature.curvature_sum import CurvatureSum, jacobians, kron_factors
from laplace_ws.curvature.lowrank import LowRankFit, low_rank_curvature
from laplace_ws.curvature.native import NativeBackend
from laplace_ws.curvature.products import CurvatureProducts

__all__ = [
    "BACKENDS",
    "FACTOR_BACKENDS",
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
    "register_backend",
]
