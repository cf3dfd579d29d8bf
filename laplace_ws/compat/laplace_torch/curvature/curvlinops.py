"""Names of `laplace.curvature.curvlinops`, which stand for the native backend."""

from __future__ import annotations

from laplace_ws.compat.laplace_torch.curvature.curvature import (
    CurvatureInterface,
    EFInterface,
    GGNInterface,
    HessianInterface,
)


class CurvlinopsInterface(CurvatureInterface):
    """What the classes of this module share."""

    name = "native"


class CurvlinopsGGN(CurvlinopsInterface, GGNInterface):
    """See `GGNInterface`."""


class CurvlinopsEF(CurvlinopsInterface, EFInterface):
    """See `EFInterface`."""


class CurvlinopsHessian(CurvlinopsInterface, HessianInterface):
    """See `HessianInterface`."""
