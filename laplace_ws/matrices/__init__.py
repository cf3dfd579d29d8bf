"""Curvature matrices: Kronecker-factored, eigenvalue-corrected, diagonal, dense, low-rank."""

from laplace_ws.matrices.base import CurvatureMatrix, by_parameter, expand_per_weight
from laplace_ws.matrices.dense import Dense
from laplace_ws.matrices.diag import Diag
from laplace_ws.matrices.eigenbasis import EigenBasis
from laplace_ws.matrices.ekfac import Ekfac, EkfacBlock
from laplace_ws.matrices.kron import Kron, KronBlock
from laplace_ws.matrices.lowrank import LowRank
from laplace_ws.matrices.pushforward import Damping, Layout, Pushforward
from laplace_ws.matrices.rows import Lookups, OuterProducts

__all__ = [
    "CurvatureMatrix",
    "Damping",
    "Dense",
    "Diag",
    "EigenBasis",
    "Ekfac",
    "EkfacBlock",
    "Kron",
    "KronBlock",
    "Layout",
    "Lookups",
    "LowRank",
    "OuterProducts",
    "Pushforward",
    "by_parameter",
    "expand_per_weight",
]
