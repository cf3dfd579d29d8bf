"""Names of `laplace.curvature.asdfghjkl`, which stand for the ASDL backend."""

from __future__ import annotations

from laplace_ws.compat.laplace_torch.curvature.curvature import (
    CurvatureInterface,
    EFInterface,
    GGNInterface,
    HessianInterface,
)


class AsdfghjklInterface(CurvatureInterface):
    """What the classes of this module share."""

    name = "asdl"


class AsdfghjklGGN(AsdfghjklInterface, GGNInterface):
    """See `GGNInterface`."""


class AsdfghjklEF(AsdfghjklInterface, EFInterface):
    """See `EFInterface`."""


class AsdfghjklHessian(AsdfghjklInterface, HessianInterface):
    """See `HessianInterface`."""
