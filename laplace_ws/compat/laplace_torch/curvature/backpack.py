"""Names of `laplace.curvature.backpack`, which stand for the BackPACK backend."""

from __future__ import annotations

from laplace_ws.compat.laplace_torch.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface


class BackPackInterface(CurvatureInterface):
    """What the classes of this module share."""

    name = "backpack"


class BackPackGGN(BackPackInterface, GGNInterface):
    """See `GGNInterface`."""


class BackPackEF(BackPackInterface, EFInterface):
    """See `EFInterface`."""
