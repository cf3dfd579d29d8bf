"""Low-rank curvature, for models that are too large for a dense matrix and whose weights interact beyond their layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from laplace_ws import saved
from laplace_ws.matrices.base import CurvatureMatrix, by_parameter, expand_per_weight, rows_by_parameter
from laplace_ws.matrices.eigen import eigh
from laplace_ws.matrices.pushforward import Damping, Layout, LowRankPushforward

_CHUNK = 2**22
"""Entries of the eigenvectors that are converted to float64 at a time."""


class LowRank(CurvatureMatrix):
    """U diag(l) Uᵀ with k orthonormal columns U.

    With A = U diag(s·l)^½ and the k×k matrix C = I + Aᵀ Δ⁻¹ A, everything needed of s·H + Δ follows from the matrix determinant
    lemma and Woodbury's identity, in O(P·k²) at most. The eigenvectors keep their precision; sums over the weights, and everything of size
    k, are float64.

    Args:
        shapes: shape of each parameter, by name.
        vectors: U, one row per weight.
        values: l, none negative.

    Raises:
        ValueError: the eigenvectors or eigenvalues do not fit the parameters or each other.
    """

    is_separable = False

    def __init__(self, shapes: Mapping[str, torch.Size], vectors: Float[Tensor, "P k"], values: Float[Tensor, " k"]):
        self.shapes: Mapping[str, torch.Size] = dict(shapes)
        self.vectors = vectors
        self.values = values
        if vectors.shape != (self.n_params, len(values)):
            raise ValueError(
                f"the eigenvectors must be {self.n_params} weights × {len(values)} eigenvalues, got shape {tuple(vectors.shape)}."
            )
        if (values < 0).any():
            raise ValueError(
                f"eigenvalues of a curvature cannot be negative, got {values.min().item():.3g}; drop those and their vectors."
            )

    @property
    def rank(self) -> int:
        """k, the number of eigenpairs."""
        return len(self.values)

    def __add__(self, other: CurvatureMatrix) -> LowRank:
        """The exact sum, whose rank is the sum of both ranks (at most P): nothing is truncated."""
        self._check_same_parameters(other)
        pairs = [(matrix.vectors, matrix.values) for matrix in (self, other)]  # type: ignore[attr-defined]
        Q, R = torch.linalg.qr(torch.cat([vectors for vectors, _ in pairs], 1))
        small = (R.double() * torch.cat([values.double() for _, values in pairs])) @ R.double().mT
        if not small.numel():
            return self
        values, rotation = eigh((small + small.mT) / 2, torch.float64, "a sum of low-rank curvatures")
        return LowRank(self.shapes, Q @ rotation.flip(1).to(Q.dtype), values.flip(0).to(self.values.dtype))

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.shapes, self.vectors, self.values * factor)

    def to_dense(self) -> Tensor:
        """See `CurvatureMatrix.to_dense`."""
        return (self.vectors * self.values.to(self.vectors.dtype)) @ self.vectors.mT

    def log_det(self, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.log_det`: log det Δ + log det C; a δ that is not per weight needs no sum over the weights."""
        log_det_delta = expand_per_weight(delta, self.shapes).double().log().sum()
        if delta.ndim == 0:
            return log_det_delta + (self.values.double() * scale.double() / delta.double()).log1p().sum()
        return log_det_delta + 2 * self._cholesky(scale, delta).diagonal().log().sum()

    @torch.no_grad()
    def effective_parameters(self, scale: Tensor, delta: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `CurvatureMatrix.effective_parameters`.

        With Σ = Δ⁻¹ − W Wᵀ and M_g = δ_g Σ_{i∈g} w_i w_iᵀ, γ_g = tr M_g and −∂γ_g/∂log δ_h = [g = h] tr M_g − ⟨M_g, M_h⟩: no difference of
        numbers near 1 is taken.
        """
        if len(delta) == 1:
            curvature = self.values.double() * scale.double()
            p = curvature / (curvature + delta)
            return p.sum()[None], (p * (1 - p)).sum()[None]
        factor = torch.linalg.cholesky(self._capacitance(scale, delta[groups]))
        roots = self._root_of_curvature(scale, factor) / delta.double().sqrt()[:, None, None]
        M = roots.mT @ self._grams_by_group(groups, len(delta)) @ roots
        gamma = M.diagonal(dim1=1, dim2=2).sum(1)
        return gamma, torch.diag(gamma) - M.flatten(1) @ M.flatten(1).mT

    def pushforward(self, dampings: Sequence[Damping], layout: Layout) -> LowRankPushforward:
        """See `CurvatureMatrix.pushforward`."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        vectors = dict(zip(self.shapes, self.vectors.split(sizes), strict=True))
        roots = [self._root_of_curvature(scale, self._cholesky(scale, delta)) for scale, delta in dampings]
        deltas = [by_parameter(delta, self.shapes) for _, delta in dampings]
        return LowRankPushforward(vectors, roots, deltas, dampings, layout)

    def solve(self, vectors: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.solve`: Δ⁻¹ v − Δ⁻¹ A C⁻¹ Aᵀ Δ⁻¹ v."""
        root = self._root_of_curvature(scale, self._cholesky(scale, delta))
        return self._less_low_rank(vectors, root @ root.mT, expand_per_weight(delta, self.shapes), 1.0)

    def inverse_diagonal(self, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.inverse_diagonal`: δ⁻¹ − ‖w_i‖², with W = Δ⁻¹ U T."""
        per_weight = expand_per_weight(delta, self.shapes).double()
        root = self._root_of_curvature(scale, self._cholesky(scale, delta))
        per_chunk = max(1, _CHUNK // max(1, self.rank))
        pairs = zip(self.vectors.split(per_chunk), per_weight.split(per_chunk), strict=True)
        return torch.cat([1 / d - (U.double() @ root).square().sum(1) / d.square() for U, d in pairs])

    def times(self, vectors: Tensor) -> Tensor:
        """See `CurvatureMatrix.times`."""
        U = self.vectors.double()
        return ((vectors.double() @ U) * self.values.double()) @ U.mT

    def inv_sqrt(self, vectors: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.inv_sqrt`.

        With B = Δ^-½ A, r² the eigenvalues of C and V its eigenvectors, L = Δ^-½ (I + B Bᵀ)^-½ = Δ^-½ (I − B V diag(1/(r² + r)) Vᵀ Bᵀ).
        """
        r2, V = torch.linalg.eigh(self._capacitance(scale, delta))
        root = self._root_of_values(scale)[:, None] * V
        small = (root / (r2 + r2.sqrt())) @ root.mT
        return self._less_low_rank(vectors, small, expand_per_weight(delta, self.shapes), 0.5)

    def tensors_by_parameter(self) -> Mapping[str, Sequence[Tensor]]:
        """See `CurvatureMatrix.tensors_by_parameter`."""
        return rows_by_parameter(self.vectors * self.values, self.shapes)

    def state_dict(self) -> dict[str, Any]:
        """See `CurvatureMatrix.state_dict`."""
        return {"vectors": self.vectors, "values": self.values}

    @classmethod
    def from_state_dict(cls, shapes: Mapping[str, torch.Size], state: Mapping[str, Any]) -> LowRank:
        """See `CurvatureMatrix.from_state_dict`."""
        values = saved.floats(saved.entry(state, "values", Tensor), "eigenvalues", least=0)
        size = sum(shape.numel() for shape in shapes.values()), values.numel()
        return cls(shapes, saved.eigenvectors(saved.entry(state, "vectors", Tensor), "eigenvectors", size), values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.shapes)} parameters, {self.n_params} weights, rank {self.rank})"

    # ------------------------------------------------------------------ of size k

    def _root_of_values(self, scale: Tensor) -> Float[Tensor, " k"]:
        return scale.double().sqrt() * self.values.double().sqrt()

    def _capacitance(self, scale: Tensor, delta: Tensor) -> Float[Tensor, "k k"]:
        """C = I + Aᵀ Δ⁻¹ A."""
        root = self.values.double().sqrt()
        product = root[:, None] * self._weighted_gram(1 / delta.double()) * root * scale.double()
        return product + torch.eye(self.rank, dtype=product.dtype, device=product.device)

    def _cholesky(self, scale: Tensor, delta: Tensor) -> Float[Tensor, "k k"]:
        return torch.linalg.cholesky(self._capacitance(scale, delta))

    def _root_of_curvature(self, scale: Tensor, cholesky: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
        """T = diag(s·l)^½ F⁻ᵀ, with F the Cholesky factor of C: W = Δ⁻¹ U T."""
        root = torch.diag(self._root_of_values(scale))
        return torch.linalg.solve_triangular(cholesky, root, upper=False).mT

    # ------------------------------------------------------------------ sums over the weights

    @cached_property
    def _grams(self) -> Float[Tensor, "T k k"]:
        """Σ u uᵀ over the weights of each parameter tensor: given these, a δ with one number per tensor needs no sum over the weights."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        return torch.stack([_gram(rows) for rows in self.vectors.split(sizes)])

    def _weighted_gram(self, weights: Tensor) -> Float[Tensor, "k k"]:
        """Σ_i w_i u_i u_iᵀ, with weights w in any form that a damping may take; differentiable in them."""
        if weights.ndim == 0 or weights.shape == (len(self.shapes),):
            return (weights.expand(len(self.shapes))[:, None, None] * self._grams).sum(0)
        return _gram(self.vectors, expand_per_weight(weights, self.shapes))

    def _grams_by_group(self, groups: Tensor, n_groups: int) -> Float[Tensor, "G k k"]:
        """Σ u uᵀ over the weights of each group."""
        if len(groups) == len(self.shapes):
            return self._grams.new_zeros(n_groups, self.rank, self.rank).index_add_(0, groups, self._grams)
        members = groups.argsort().split(groups.bincount(minlength=n_groups).tolist())
        return torch.stack([_gram(self.vectors[rows]) for rows in members])

    def _less_low_rank(
        self, vectors: Float[Tensor, "S P"], small: Float[Tensor, "k k"], delta: Float[Tensor, " P"], power: float
    ) -> Float[Tensor, "S P"]:
        """(I − Δ⁻¹ U K Uᵀ) Δ^-power v for each row v, K the small matrix; in float64 throughout, as stiff directions cancel."""
        per_chunk = max(1, _CHUNK // max(1, self.rank, len(vectors)))
        pieces = list(zip(*(part.split(per_chunk) for part in (vectors.mT, delta.double(), self.vectors)), strict=True))
        damped = [v.double() * d[:, None] ** -power for v, d, _ in pieces]
        inner = torch.stack([U.double().mT @ w for w, (_, _, U) in zip(damped, pieces, strict=True)]).sum(0)
        results = [w - U.double() @ (small @ inner) / d[:, None] for w, (_, d, U) in zip(damped, pieces, strict=True)]
        return torch.cat(results).mT.to(vectors.dtype)


def _gram(rows: Float[Tensor, "n k"], weights: Float[Tensor, " n"] | None = None) -> Float[Tensor, "k k"]:
    """Σ_i w_i u_i u_iᵀ in float64, differentiable in the weights."""
    per_chunk = max(1, _CHUNK // max(1, rows.shape[1]))
    if weights is None:
        return torch.stack([_chunk_gram(chunk) for chunk in rows.split(per_chunk)]).sum(0)
    chunks = zip(rows.split(per_chunk), weights.split(per_chunk), strict=True)
    # checkpoints, as autograd would keep all of the rows in float64
    parts = [checkpoint(_chunk_gram, *pair, use_reentrant=False, preserve_rng_state=False) for pair in chunks]
    return torch.stack(parts).sum(0)  # pyright: ignore


def _chunk_gram(rows: Float[Tensor, "n k"], weights: Float[Tensor, " n"] | None = None) -> Float[Tensor, "k k"]:
    rows = rows.double()
    return (rows if weights is None else rows * weights[:, None]).mT @ rows
