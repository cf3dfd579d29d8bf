"""Curvature with one block per parameter tensor, each diagonal in the eigenvectors of a Kronecker product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.matrices import spectrum
from laplace_ws.matrices.base import CurvatureMatrix
from laplace_ws.matrices.eigenbasis import EigenBasis
from laplace_ws.matrices.pushforward import Damping, Layout, SeparablePushforward


class Block(ABC):
    """The curvature of one parameter tensor.

    Attributes:
        shape: shape of the parameter.
    """

    shape: torch.Size

    @cached_property
    @abstractmethod
    def basis(self) -> EigenBasis:
        """Its eigenvectors."""

    @cached_property
    @abstractmethod
    def factor_eigenvalues(self) -> tuple[Tensor, Tensor]:
        """Two vectors in float64, `[*G, O]` and `[*G, I]`, whose products are the eigenvalues; computed without eigenvectors."""

    @abstractmethod
    def eigenvalues(self) -> Float[Tensor, "*G O I"]:
        """The eigenvalues in the order of the coordinates, float64."""

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "D D"]:
        """The block in full, over the parameter flattened row-major."""


B = TypeVar("B", bound=Block)


class BlockMatrix(CurvatureMatrix, Mapping[str, B], Generic[B]):
    """A mapping from parameter name to its block, and the algebra of their direct sum."""

    def __init__(self, blocks: Mapping[str, B]):
        self.blocks: dict[str, B] = dict(blocks)
        self.shapes: Mapping[str, torch.Size] = {name: block.shape for name, block in self.blocks.items()}

    def __getitem__(self, name: str) -> B:
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def to_dense(self) -> Tensor:
        """See `CurvatureMatrix.to_dense`."""
        return torch.block_diag(*(block.to_dense() for block in self.blocks.values()))

    def log_det(self, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.log_det`; needs eigenvalues only."""
        pairs = list(self._with_delta(delta))
        sizes = torch.tensor([block.shape.numel() for block, _ in pairs], device=delta.device)
        terms = [spectrum.sum_log1p(*block.factor_eigenvalues, scale.double() / d) for block, d in pairs]
        return torch.stack(terms).sum() + (sizes * torch.stack([d for _, d in pairs]).log()).sum()

    @torch.no_grad()
    def effective_parameters(self, scale: Tensor, delta: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `CurvatureMatrix.effective_parameters`; needs eigenvalues only."""
        pairs = self._with_delta(delta[groups])
        parts = [spectrum.effective_parameters(*b.factor_eigenvalues, scale.double() / d) for b, d in pairs]
        gamma, decrease = delta.new_zeros(2, len(delta)).index_add_(1, groups, torch.stack(parts, 1)).unbind()
        return gamma, decrease

    def solve(self, vectors: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.solve`."""
        solved = []
        for part, block, variances in self._parts(vectors, scale, delta):
            coordinates = block.basis.rotate(part.double()) * variances
            solved.append(block.basis.rotate_back(coordinates).to(part.dtype))
        return torch.cat(solved, dim=1)

    def inv_sqrt(self, vectors: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.inv_sqrt`: Q diag^(-1/2), so that each vector is turned once, and in its own precision.

        A sum of roundings of standard deviations does no harm to a sample, as it may to a solution.
        """
        drawn = []
        with torch.autocast(vectors.device.type, enabled=False):  # the precision is that of the vectors, whoever calls
            for part, block, variances in self._parts(vectors, scale, delta):
                coordinates = part.reshape(len(part), *variances.shape) * variances.sqrt().to(part.dtype)
                drawn.append(block.basis.rotate_back(coordinates))
        return torch.cat(drawn, dim=1)

    def inverse_diagonal(self, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.inverse_diagonal`: Σ_k Q_ik² / (s·λ_k + δ), a product of factors like the eigenvectors."""
        parts = []
        for block, d in self._with_delta(delta):
            parts.append(block.basis.diagonal(1 / (block.eigenvalues() * scale.double() + d)))
        return torch.cat(parts)

    def times(self, vectors: Tensor) -> Tensor:
        """See `CurvatureMatrix.times`."""
        parts = vectors.double().split([shape.numel() for shape in self.shapes.values()], dim=1)
        pairs = zip(parts, self.blocks.values(), strict=True)
        return torch.cat([b.basis.rotate_back(b.basis.rotate(part) * b.eigenvalues()) for part, b in pairs], dim=1)

    def basis(self, name: str) -> EigenBasis:
        """See `CurvatureMatrix.basis`."""
        return self.blocks[name].basis

    def pushforward(self, dampings: Sequence[Damping], layout: Layout) -> SeparablePushforward:
        """See `CurvatureMatrix.pushforward`."""
        places = {name: place for place, name in enumerate(self.blocks)}

        def variances(name: str, scale: Tensor, delta: Tensor) -> Tensor:
            of_block = delta if delta.ndim == 0 else delta[places[name]]
            return 1 / (self.blocks[name].eigenvalues() * scale.double() + of_block.double()).flatten()

        for _, delta in dampings:
            self._with_delta(delta)
        return SeparablePushforward(variances, dampings, layout)

    def _parts(
        self, vectors: Float[Tensor, "S P"], scale: Tensor, delta: Tensor
    ) -> Iterator[tuple[Float[Tensor, "S D"], B, Float[Tensor, "*G O I"]]]:
        """By block: its part of the vectors, itself, and its variances 1 / (s·λ + δ) in float64."""
        parts = vectors.split([shape.numel() for shape in self.shapes.values()], dim=1)
        for part, (block, d) in zip(parts, self._with_delta(delta), strict=True):
            yield part, block, 1 / (block.eigenvalues() * scale.double() + d)

    def _with_delta(self, delta: Tensor) -> Iterator[tuple[B, Tensor]]:
        if delta.ndim > 0 and delta.shape != (len(self),):
            raise ValueError(
                f"a Kronecker-factored posterior takes a scalar precision or one per parameter tensor ({len(self)}), got shape "
                f'{tuple(delta.shape)}; use hessian_structure="diag" or "full" for one per weight.'
            )
        return zip(self.blocks.values(), delta.double().expand(len(self)), strict=True)
