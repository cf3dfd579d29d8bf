"""Names of `laplace.curvature`: which curvature, and which backend computes it."""

from laplace_ws.compat.laplace_torch.curvature.asdfghjkl import (
    AsdfghjklEF,
    AsdfghjklGGN,
    AsdfghjklHessian,
    AsdfghjklInterface,
)
from laplace_ws.compat.laplace_torch.curvature.asdl import AsdlEF, AsdlGGN, AsdlHessian, AsdlInterface
from laplace_ws.compat.laplace_torch.curvature.backpack import BackPackEF, BackPackGGN, BackPackInterface
from laplace_ws.compat.laplace_torch.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace_ws.compat.laplace_torch.curvature.curvlinops import (
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
    CurvlinopsInterface,
)

__all__ = [
    "AsdfghjklEF",
    "AsdfghjklGGN",
    "AsdfghjklHessian",
    "AsdfghjklInterface",
    "AsdlEF",
    "AsdlGGN",
    "AsdlHessian",
    "AsdlInterface",
    "BackPackEF",
    "BackPackGGN",
    "BackPackInterface",
    "CurvatureInterface",
    "CurvlinopsEF",
    "CurvlinopsGGN",
    "CurvlinopsHessian",
    "CurvlinopsInterface",
    "EFInterface",
    "GGNInterface",
]
