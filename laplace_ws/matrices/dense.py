"""Dense curvature, for small models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.matrices.base import CurvatureMatrix, eigenvalues, eigh, expand_per_weight


class Dense(CurvatureMatrix):
    """A full matrix over all weights.

    Args:
        shapes: shape of each parameter, by name.
        matrix: H.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], matrix: Float[Tensor, "P P"]):
        self.shapes = dict(shapes)
        self.matrix = matrix

    def __add__(self, other: CurvatureMatrix) -> Dense:
        self._check_same_parameters(other)
        return Dense(self.shapes, self.matrix + other.matrix)  # type: ignore[attr-defined]

    def __mul__(self, factor: float) -> Dense:
        return Dense(self.shapes, self.matrix * factor)

    def to_dense(self) -> Tensor:
        """See `CurvatureMatrix.to_dense`."""
        return self.matrix

    @cached_property
    def _eigenvalues(self) -> Tensor:
        return eigenvalues(self.matrix, "the dense curvature")

    @cached_property
    def _psd(self) -> Float[Tensor, "P P"]:
        """H in float64 without the negative eigenvalues that rounding gives, so that every δ > 0 makes it definite."""
        values, vectors = eigh((self.matrix + self.matrix.mT) / 2, "the dense curvature")
        return (vectors * values) @ vectors.mT

    def damped(self, scale: Tensor, delta: Tensor) -> Float[Tensor, "P P"]:
        """scale·H + diag(δ), float64."""
        return self._psd * scale.double() + torch.diag(expand_per_weight(delta, self.shapes).double())

    def log_det(self, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.log_det`; a scalar δ needs the eigenvalues only, which are kept."""
        if delta.ndim == 0:
            return (self._eigenvalues * scale.double() + delta.double()).log().sum()
        return 2 * torch.linalg.cholesky(self.damped(scale, delta)).diagonal().log().sum()

    def solve(self, vectors: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.solve`."""
        factor = torch.linalg.cholesky(self.damped(scale, delta))
        return torch.cholesky_solve(vectors.double().mT, factor).mT.to(vectors.dtype)

    def inv_sqrt(self, vectors: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.inv_sqrt`; L⁻ᵀ v with L the Cholesky factor."""
        factor = torch.linalg.cholesky(self.damped(scale, delta))
        return torch.linalg.solve_triangular(factor.mT, vectors.double().mT, upper=True).mT.to(vectors.dtype)

    def state_dict(self) -> dict[str, Any]:
        """See `CurvatureMatrix.state_dict`."""
        return {"matrix": self.matrix}

    @classmethod
    def from_state_dict(cls, shapes: Mapping[str, torch.Size], state: Mapping[str, Any]) -> Dense:
        """See `CurvatureMatrix.from_state_dict`."""
        return cls(shapes, state["matrix"])
