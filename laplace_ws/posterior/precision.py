"""The precision of a posterior whose structure has no explicit form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.matrices import CurvatureMatrix, Layout, expand_per_weight


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

    def times(self, vectors: Float[Tensor, "S P"]) -> Float[Tensor, "S P"]:
        """Product with each row, float64."""
        return self.H.times(vectors) * self.scale.double() + vectors.double() * self._per_weight

    def inverse_diagonal(self) -> Float[Tensor, " P"]:
        """The diagonal of the inverse, float64."""
        return self.H.inverse_diagonal(self.scale, self.delta)

    def inverse(self) -> Float[Tensor, "P P"]:
        """The inverse in full, float64."""
        delta = self.delta
        return self.solve(torch.eye(self.H.n_params, dtype=torch.float64, device=delta.device))

    def pushed(self, rows: Float[Tensor, "N K P"], layout: Layout) -> Tensor:
        """J P⁻¹ Jᵀ in a layout, J being K rows for each of N examples."""
        pushforward = self.H.pushforward([(self.scale, self.delta)], layout)
        sizes = [shape.numel() for shape in self.H.shapes.values()]
        for name, part in zip(self.H.shapes, rows.split(sizes, dim=-1), strict=True):
            basis = self.H.basis(name)
            pushforward.add(name, part if basis is None else basis.rotate(part).flatten(2))
        return pushforward.result()[0]

    @property
    def _per_weight(self) -> Float[Tensor, " P"]:
        return expand_per_weight(self.delta, self.H.shapes).double()

    def to_dense(self) -> Float[Tensor, "P P"]:
        """The precision in full."""
        return self.H.to_dense().double() * self.scale + torch.diag(self._per_weight)
