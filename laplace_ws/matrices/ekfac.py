"""Kronecker eigenvectors with corrected eigenvalues: EKFAC."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws import saved
from laplace_ws.files import FileFormatError
from laplace_ws.matrices.axes import WeightAxes, saved_output_axes
from laplace_ws.matrices.base import CurvatureMatrix
from laplace_ws.matrices.blocks import Block, BlockMatrix
from laplace_ws.matrices.eigenbasis import EigenBasis


@dataclass(frozen=True, eq=False)
class EkfacBlock(Block):
    """Q diag(values) Qᵀ, with Q the eigenvectors of a Kronecker product [George et al. 2018].

    The values that best approximate a curvature, in the Frobenius norm, are its diagonal in these coordinates.

    Attributes:
        shape: shape of the parameter.
        eigenbasis: Q.
        values: the second moments of gradients in these coordinates, sums over data, `[*G, O, I]`.
    """

    shape: torch.Size
    eigenbasis: EigenBasis
    values: Float[Tensor, "*G O I"]

    @cached_property
    def basis(self) -> EigenBasis:
        """See `Block.basis`."""
        return self.eigenbasis

    @cached_property
    def factor_eigenvalues(self) -> tuple[Tensor, Tensor]:
        """See `Block.factor_eigenvalues`; all of them, times one."""
        values = self.values.double().flatten()
        return values, values.new_ones(1)

    def eigenvalues(self) -> Tensor:
        """See `Block.eigenvalues`."""
        return self.values.double()

    def to_dense(self) -> Tensor:
        """See `Block.to_dense`."""
        return self.eigenbasis.to_dense(self.values)


class Ekfac(BlockMatrix[EkfacBlock]):
    """Eigenvalue-corrected Kronecker curvature: a mapping from parameter name to its `EkfacBlock`."""

    def __add__(self, other: CurvatureMatrix) -> Ekfac:
        """See `CurvatureMatrix.__add__`; both must have the same eigenvectors, so that the values add up."""
        self._check_same_parameters(other)
        assert isinstance(other, Ekfac)
        if any(not block.eigenbasis.equals(other[name].eigenbasis) for name, block in self.blocks.items()):
            raise ValueError("cannot add eigenvalue-corrected curvatures in different eigenvectors.")
        return Ekfac({n: replace(block, values=block.values + other[n].values) for n, block in self.blocks.items()})

    def __mul__(self, factor: float) -> Ekfac:
        """See `CurvatureMatrix.__mul__`."""
        return Ekfac({n: replace(block, values=block.values * factor) for n, block in self.blocks.items()})

    def tensors_by_parameter(self) -> Mapping[str, Sequence[Tensor]]:
        """See `CurvatureMatrix.tensors_by_parameter`."""
        return {name: [block.values] for name, block in self.blocks.items()}

    def state_dict(self) -> dict[str, Any]:
        """See `CurvatureMatrix.state_dict`."""
        return {
            name: {
                "Q_B": block.eigenbasis.Q_B,
                "Q_A": block.eigenbasis.Q_A,
                "output_axes": block.eigenbasis.axes.state(),
                "values": block.values,
            }
            for name, block in self.blocks.items()
        }

    @classmethod
    def from_state_dict(cls, shapes: Mapping[str, torch.Size], state: Mapping[str, Any]) -> Ekfac:
        """See `CurvatureMatrix.from_state_dict`."""
        blocks = {}
        for name, shape in shapes.items():
            block, of = saved.entry(state, name, Mapping), f" of {name!r}"
            values = saved.floats(saved.entry(block, "values", Tensor, of=of), f"eigenvalues{of}", least=0)
            is_grouped = values.ndim == 3 and len(values) > 1
            if values.numel() != shape.numel() or not (values.ndim == 2 or is_grouped):
                raise FileFormatError(f"the saved eigenvalues{of} do not fit its shape {tuple(shape)}.")
            Q_B, Q_A = (saved.entry(block, field, Tensor, None, of=of) for field in ("Q_B", "Q_A"))
            *groups, n_out, n_in = values.shape
            for Q, n in ((Q_B, n_out), (Q_A, n_in)):
                if Q is not None:
                    saved.eigenvectors(Q, f"eigenvectors{of}", (*groups, n, n))
            axes = WeightAxes(shape, saved_output_axes(block, shape, of), math.prod(groups))
            if n_in == 1 and axes.sizes != values.shape:  # no weight
                axes = WeightAxes(torch.Size([shape.numel()]))
            if axes.sizes != values.shape:
                raise FileFormatError(f"the saved eigenvalues{of} do not fit its shape {tuple(shape)}.")
            blocks[name] = EkfacBlock(shape, EigenBasis(Q_B, Q_A, axes), values)
        return cls(blocks)
