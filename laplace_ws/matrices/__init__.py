"""Curvature matrices: Kronecker-factored, diagonal, dense."""

from laplace_ws.matrices.base import CurvatureMatrix, expand_per_weight
from laplace_ws.matrices.dense import Dense
from laplace_ws.matrices.diag import Diag
from laplace_ws.matrices.kron import Kron, KronBlock

__all__ = ["CurvatureMatrix", "Dense", "Diag", "Kron", "KronBlock", "expand_per_weight"]
