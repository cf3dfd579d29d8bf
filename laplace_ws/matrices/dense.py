"""Dense curvature, for small models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws import saved
from laplace_ws.matrices.base import CurvatureMatrix, expand_per_weight, rows_by_parameter
from laplace_ws.matrices.eigen import decomposition_dtype, eigenvalues, eigh
from laplace_ws.matrices.pushforward import Damping, DensePushforward, Layout, Pushforward, RotatedPushforward
from laplace_ws.memory import check_memory


class Dense(CurvatureMatrix):
    """A full matrix over all weights.

    Args:
        shapes: shape of each parameter, by name.
        matrix: H.
    """

    is_separable = False

    def __init__(self, shapes: Mapping[str, torch.Size], matrix: Float[Tensor, "P P"]):
        self.shapes: Mapping[str, torch.Size] = dict(shapes)
        self.matrix = matrix
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __add__(self, other: CurvatureMatrix) -> Dense:
        self._check_same_parameters(other)
        return Dense(self.shapes, self.matrix + other.matrix)  # type: ignore[attr-defined]

    def __mul__(self, factor: float) -> Dense:
        return Dense(self.shapes, self.matrix * factor)

    def to_dense(self) -> Tensor:
        """See `CurvatureMatrix.to_dense`."""
        return self.matrix

    @cached_property
    def decomposition_dtype(self) -> torch.dtype:
        """The precision of the eigenvalues, see `eigen.decomposition_dtype`; asking computes none of them."""
        return decomposition_dtype(self.matrix)

    @cached_property
    def _eigenvalues(self) -> Tensor:
        return eigenvalues(self.matrix, self.decomposition_dtype, "the dense curvature")

    @cached_property
    def _psd(self) -> Float[Tensor, "P P"]:
        """H in float64 without the negative eigenvalues that rounding causes, so that every δ > 0 makes it positive definite."""
        symmetric = (self.matrix + self.matrix.mT) / 2
        if self.decomposition_dtype != torch.float64:  # then its smallest eigenvalue exceeds its rounding
            return symmetric.double()
        values, vectors = self._eigen
        return (vectors * values) @ vectors.mT

    def damped(self, scale: Tensor, delta: Tensor) -> Float[Tensor, "P P"]:
        """scale·H + diag(δ), float64."""
        return self._psd * scale.double() + torch.diag(expand_per_weight(delta, self.shapes).double())

    def log_det(self, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.log_det`; a scalar δ needs the eigenvalues only, which are kept."""
        if delta.ndim == 0:
            return (self._eigenvalues * scale.double() + delta.double()).log().sum()
        return 2 * torch.linalg.cholesky(self.damped(scale, delta)).diagonal().log().sum()

    @torch.no_grad()
    def effective_parameters(self, scale: Tensor, delta: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `CurvatureMatrix.effective_parameters`; a single group needs the eigenvalues only."""
        if len(delta) == 1:
            curvature = self._eigenvalues * scale.double()
            p = curvature / (curvature + delta)
            return p.sum()[None], (p * (1 - p)).sum()[None]
        index = expand_per_weight(groups, self.shapes)
        per_weight = delta[index]
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(self.damped(scale, per_weight)))
        # (sSH)_ii rather than 1 − δ_i S_ii, which loses a small γ to rounding.
        gamma = (covariance * self._psd).sum(1).mul(scale.double()).clamp_min(0)
        shared = covariance.square() * per_weight[:, None] * per_weight
        by_group = delta.new_zeros(len(delta), self.n_params).index_add_(0, index, shared)
        interaction = delta.new_zeros(len(delta), len(delta)).index_add_(1, index, by_group)
        shrinkage = delta.new_zeros(2, len(delta))
        shrinkage.index_add_(1, index, torch.stack([gamma, per_weight * covariance.diagonal()]))
        return shrinkage[0], torch.diag(shrinkage[1]) - interaction

    def cholesky(self, scale: Tensor, delta: Tensor) -> Float[Tensor, "P P"]:
        """Lower Cholesky factor of scale·H + diag(δ), float64; the last one is kept, as one prediction follows another."""
        if scale.requires_grad or delta.requires_grad:
            return torch.linalg.cholesky(self.damped(scale, delta))
        if self._last is None or not (torch.equal(self._last[0], scale) and torch.equal(self._last[1], delta)):
            self._check_memory()
            factor = torch.linalg.cholesky(self.damped(scale, delta))
            self._last = scale.clone(), delta.clone(), factor
        return self._last[2]

    def pushforward(self, dampings: Sequence[Damping], layout: Layout) -> Pushforward:
        """See `CurvatureMatrix.pushforward`; several scalar δ share the eigenvectors of H instead of having a factor each."""
        if len(dampings) > 1 and all(delta.ndim == 0 for _, delta in dampings):
            return RotatedPushforward(*self._eigen, dampings, layout)
        return DensePushforward([self.cholesky(*damping) for damping in dampings], dampings, layout)

    def _check_memory(self) -> None:
        """Raise `NotEnoughMemoryError` unless H in float64, the precision and its factor fit."""
        check_memory(
            3 * 8 * self.n_params**2,
            self.matrix.device,
            f"the Cholesky factor of a full matrix over {self.n_params:,} weights",
            'choose hessian_structure="kron", "diag" or "lowrank", or fewer weights by subset_of_weights',
        )

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        return eigh((self.matrix + self.matrix.mT) / 2, torch.float64, "the dense curvature")

    def solve(self, vectors: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.solve`."""
        factor = self.cholesky(scale, delta)
        return torch.cholesky_solve(vectors.double().mT, factor).mT.to(vectors.dtype)

    def inverse_diagonal(self, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.inverse_diagonal`."""
        return torch.cholesky_inverse(self.cholesky(scale, delta)).diagonal()

    def times(self, vectors: Tensor) -> Tensor:
        """See `CurvatureMatrix.times`; without the negative eigenvalues that rounding causes, like all else."""
        return vectors.double() @ self._psd

    def inv_sqrt(self, vectors: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.inv_sqrt`; L⁻ᵀ v with L the Cholesky factor."""
        factor = self.cholesky(scale, delta)
        return torch.linalg.solve_triangular(factor.mT, vectors.double().mT, upper=True).mT.to(vectors.dtype)

    def tensors_by_parameter(self) -> Mapping[str, Sequence[Tensor]]:
        """See `CurvatureMatrix.tensors_by_parameter`."""
        return rows_by_parameter(self.matrix, self.shapes)

    def state_dict(self) -> dict[str, Any]:
        """See `CurvatureMatrix.state_dict`."""
        return {"matrix": self.matrix}

    @classmethod
    def from_state_dict(cls, shapes: Mapping[str, torch.Size], state: Mapping[str, Any]) -> Dense:
        """See `CurvatureMatrix.from_state_dict`."""
        n_params = sum(shape.numel() for shape in shapes.values())
        matrix = saved.floats(saved.entry(state, "matrix", Tensor), "matrix", (n_params, n_params))
        return cls(shapes, saved.curvature(matrix, "matrix"))
