"""Names of `laplace.curvature.asdl`, which stand for the ASDL backend."""

from __future__ import annotations

from laplace_ws.compat.laplace_torch.curvature.curvature import (
    CurvatureInterface,
    EFInterface,
    GGNInterface,
    HessianInterface,
)


class AsdlInterface(CurvatureInterface):
    """What the classes of this module share."""

    name = "asdl"


class AsdlGGN(AsdlInterface, GGNInterface):
    """See `GGNInterface`."""


class AsdlEF(AsdlInterface, EFInterface):
    """See `EFInterface`."""


class AsdlHessian(AsdlInterface, HessianInterface):
    """See `HessianInterface`."""
