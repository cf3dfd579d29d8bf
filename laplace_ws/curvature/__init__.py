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
from laplace_ws.curvature.native import NativeBackend

__all__ = [
    "BACKENDS",
    "Backend",
    "Curvature",
    "CurvatureSum",
    "Linearisation",
    "NativeBackend",
    "jacobians",
    "kron_factors",
    "make_backend",
    "parse_curvature",
]
