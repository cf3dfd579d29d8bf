"""The precision of a posterior whose structure has no explicit form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.matrices import CurvatureMatrix, expand_per_weight


@dataclass(frozen=True)
class PosteriorPrecision:
    """scale·H + diag(δ), given by the operations on it.

    Attributes:
        H: the curvature.
        scale: what the curvature is multiplied by.
        delta: prior precision.
    """

    H: CurvatureMatrix
    scale: Tensor
    delta: Tensor

    def log_det(self) -> Float[Tensor, ""]:
        """Log determinant, float64."""
        return self.H.log_det(self.scale, self.delta)

    def solve(self, vectors: Float[Tensor, "S P"]) -> Float[Tensor, "S P"]:
        """Product of the inverse with each row."""
        return self.H.solve(vectors, self.scale, self.delta)

    def to_dense(self) -> Float[Tensor, "P P"]:
        """The precision in full."""
        return self.H.to_dense().double() * self.scale + torch.diag(expand_per_weight(self.delta, self.H.shapes))
