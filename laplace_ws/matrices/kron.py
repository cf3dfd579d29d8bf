"""Block-diagonal Kronecker curvature: one block B ⊗ A per parameter."""

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
from laplace_ws.matrices.eigen import decomposition_dtype, eigenvalues, eigh, thin_eigh
from laplace_ws.matrices.eigenbasis import EigenBasis

_MOST_SHOWN = 4
"""Parameters with diagonal factors that the representation of a matrix names."""


@dataclass(frozen=True, eq=False)
class KronBlock(Block):
    """The block of one parameter: B ⊗ A over `weight.flatten(1)`, or B alone over a vector.

    Layers with channel groups, and attention's packed projections, hold one pair of factors per group, stacked along a leading axis; their
    block is the direct sum of the groups'. Where other axes of the weight than the first run over the outputs (embeddings, `x @ W`,
    transposed convolutions), the block is B ⊗ A in the order of the flattened matrices `[O, I]`, see `WeightAxes`.

    Attributes:
        shape: shape of the parameter.
        B: gradient factor, a sum over data, `[*G, O, O]`; `[*G, O]` for a diagonal.
        A: input factor, a mean over data, `[*G, I, I]`; `[*G, I]` for a diagonal; None for a vector.
        n_inputs: number of inputs that the mean A is taken over, `[G, 1, 1]` where the groups differ.
        output_axes: of the weight, see `WeightAxes`.
        diagonal_B: whether B is kept as its diagonal.
        diagonal_A: whether A is kept as its diagonal.
        approx: "expand" or "reduce", where it is one of the two; None where it is not known or there is no choice.
    """

    shape: torch.Size
    B: Tensor
    A: Tensor | None = None
    n_inputs: float | Tensor = 0
    output_axes: tuple[int, ...] = (0,)
    diagonal_B: bool = False
    diagonal_A: bool = False
    approx: str | None = None

    def __add__(self, other: KronBlock) -> KronBlock:
        """Combine the factors of two data sets: sums of B, and the mean A over the inputs of both.

        Raises:
            ValueError: they are not by the same approximation, or one keeps a factor whole of which the other has the diagonal.
        """
        if self.approx != other.approx:
            kinds = [f"K-FAC-{a}" if a else "an approximation that is not known" for a in (self.approx, other.approx)]
            raise ValueError(f"factors by {kinds[0]} and by {kinds[1]} do not add up; fit all the data anew.")
        if (self.diagonal_A, self.diagonal_B) != (other.diagonal_A, other.diagonal_B):
            raise ValueError("a factor and the diagonal of another do not add up; fit all the data anew.")
        A, n_inputs = self.A, self.n_inputs + other.n_inputs
        if A is not None and other.A is not None:
            n, n_other, n_both = (
                of_groups(n, is_diagonal=self.diagonal_A)
                for n in (self.n_inputs, other.n_inputs, at_least_one(n_inputs))
            )
            A = (A * n + other.A * n_other) / n_both
        return replace(self, A=A, B=self.B + other.B, n_inputs=n_inputs)

    def to_dense(self) -> Float[Tensor, "D D"]:
        """The block in full, over the parameter flattened row-major."""
        B = torch.diag_embed(self.B) if self.diagonal_B else self.B
        if self.A is None:
            return B
        A = torch.diag_embed(self.A) if self.diagonal_A else self.A
        dense = torch.block_diag(*map(torch.kron, B, A)) if self.is_grouped else torch.kron(B, A)
        if self.axes.is_row_major:
            return dense
        places = self.axes.places(dense.device)
        out = torch.empty_like(dense)
        out[places[:, None], places] = dense
        return out

    @property
    def is_grouped(self) -> bool:
        """Whether the factors are those of several groups."""
        return self.B.ndim == (2 if self.diagonal_B else 3)

    @property
    def axes(self) -> WeightAxes:
        """How the parameter holds the matrices that the factors are of."""
        if self.A is None:
            return WeightAxes(torch.Size([self.shape.numel()]))
        return WeightAxes(self.shape, self.output_axes, len(self.B) if self.is_grouped else 1)

    @cached_property
    def decomposition_dtypes(self) -> tuple[torch.dtype | None, torch.dtype | None]:
        """The precisions in which B and A are decomposed, see `eigen.decomposition_dtype`; None where there is nothing to decompose.

        The groups of a grouped factor share one. Reading this decomposes nothing.
        """
        B = None if self.diagonal_B else decomposition_dtype(self.B)
        return B, None if self.A is None or self.diagonal_A else decomposition_dtype(self.A)

    @cached_property
    def factor_eigenvalues(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of B `[*G, O]` and A `[*G, I]` in float64, without eigenvectors."""
        if "eigen" in self.__dict__:
            return self.eigen[0][0], self.eigen[1][0]
        B_dtype, A_dtype = self.decomposition_dtypes
        thin = self._thin_A(vectors=False)
        return _eigenvalues(self.B, B_dtype, self.B), thin[0] if thin else _eigenvalues(self.A, A_dtype, self.B)

    @cached_property
    def eigen(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Eigenvalues in float64 and eigenvectors (None for the identity), in the precision of the factors, of B and A."""
        B_dtype, A_dtype = self.decomposition_dtypes
        return _eigen(self.B, B_dtype, self.B), self._thin_A(vectors=True) or _eigen(self.A, A_dtype, self.B)

    def _thin_A(self, *, vectors: bool) -> tuple[Tensor, Tensor | None] | None:
        """Eigenvalues and eigenvectors of A by a short way, where it is a mean over far fewer inputs than it has rows; else None."""
        if self.A is None or self.decomposition_dtypes[1] != torch.float64 or self.A.ndim > 2:
            return None
        return thin_eigh(self.A, math.ceil(float(self.n_inputs)), "a Kronecker factor", vectors=vectors)

    def accept(self, of_B: tuple[Tensor, Tensor | None], of_A: tuple[Tensor, Tensor | None], *, vectors: bool) -> None:
        """Take the eigenvalues, and with `vectors` the eigenvectors, as computed elsewhere, in place of computing them."""
        known = vars(self)  # where `cached_property` keeps them
        known["factor_eigenvalues"] = of_B[0], of_A[0]
        if vectors:
            known["eigen"] = of_B, of_A

    def eigenvalues(self) -> Float[Tensor, "*G O I"]:
        """Products of the factors' eigenvalues: the spectrum of the block, float64."""
        b, a = self.factor_eigenvalues
        return b[..., :, None] * a[..., None, :]

    @cached_property
    def basis(self) -> EigenBasis:
        """See `Block.basis`."""
        (_, Q_B), (_, Q_A) = self.eigen
        return EigenBasis(Q_B, Q_A, self.axes)


class Kron(BlockMatrix[KronBlock]):
    """Kronecker-factored curvature: a mapping from parameter name to its `KronBlock`."""

    def __add__(self, other: CurvatureMatrix) -> Kron:
        """See `CurvatureMatrix.__add__`; the factors of both data sets, not a sum of Kronecker products."""
        self._check_same_parameters(other)
        assert isinstance(other, Kron)
        return Kron({name: block + other[name] for name, block in self.blocks.items()})

    def __mul__(self, factor: float) -> Kron:
        """See `CurvatureMatrix.__mul__`."""
        return Kron({n: replace(b, B=b.B * factor, n_inputs=b.n_inputs * factor) for n, b in self.blocks.items()})

    @property
    def decomposition_dtypes(self) -> dict[str, tuple[torch.dtype | None, torch.dtype | None]]:
        """By parameter, the precisions in which its B and A are decomposed; see `KronBlock.decomposition_dtypes`."""
        return {name: block.decomposition_dtypes for name, block in self.blocks.items()}

    @property
    def diagonal_factors(self) -> dict[str, tuple[str, ...]]:
        """By parameter, which of its factors "A" and "B" are kept as their diagonals, by nature or because they are wide."""
        of_each = {
            name: (*(["A"] if block.diagonal_A else []), *(["B"] if block.diagonal_B else []))
            for name, block in self.blocks.items()
        }
        return {name: factors for name, factors in of_each.items() if factors}

    def tensors_by_parameter(self) -> Mapping[str, Sequence[Tensor]]:
        """See `CurvatureMatrix.tensors_by_parameter`."""
        return {name: [block.B, *([] if block.A is None else [block.A])] for name, block in self.blocks.items()}

    def state_dict(self) -> dict[str, Any]:
        """See `CurvatureMatrix.state_dict`."""
        fields = ("B", "A", "n_inputs", "diagonal_B", "diagonal_A", "approx")
        return {
            name: {field: getattr(block, field) for field in fields} | {"output_axes": list(block.output_axes)}
            for name, block in self.blocks.items()
        }

    def __repr__(self) -> str:
        names = [f"{' and '.join(factors)} of {name!r}" for name, factors in self.diagonal_factors.items()]
        listed = names[:_MOST_SHOWN] + ([f"{len(names) - _MOST_SHOWN} others"] if len(names) > _MOST_SHOWN else [])
        diagonals = f", only the diagonal of {', '.join(listed)}" if names else ""
        return f"Kron({len(self)} parameters, {self.n_params} weights{diagonals})"

    @classmethod
    def from_state_dict(cls, shapes: Mapping[str, torch.Size], state: Mapping[str, Any]) -> Kron:
        """See `CurvatureMatrix.from_state_dict`."""
        return cls({name: _restored(name, shape, saved.entry(state, name, Mapping)) for name, shape in shapes.items()})


def _restored(name: str, shape: torch.Size, state: Mapping[str, Any]) -> KronBlock:
    """One block of `Kron.state_dict`; raises `FileFormatError` for one that is damaged."""
    of = f" of {name!r}"
    fields = {field: saved.entry(state, field, bool, of=of) for field in ("diagonal_B", "diagonal_A")}
    approx = saved.entry({"approx": None, **state}, "approx", str, None, of=of)  # files of earlier versions do not say
    B = saved.entry(state, "B", Tensor, of=of)
    A = saved.entry(state, "A", Tensor, None, of=of)
    for field, factor in (("B", B), ("A", A)):
        if factor is not None and fields[f"diagonal_{field}"]:
            shape_of_diagonal = tuple(factor.shape) if factor.ndim == 2 else (factor.numel(),)
            saved.floats(factor, f"factor {field}{of}", shape_of_diagonal, least=0)
        elif factor is not None:
            saved.curvature(factor, f"factor {field}{of}")
    factors = [(B, fields["diagonal_B"]), *([] if A is None else [(A, fields["diagonal_A"])])]
    groups = {factor.shape[: -1 if is_diagonal else -2] for factor, is_diagonal in factors}
    n_groups = math.prod(*groups) if len(groups) == 1 else 0
    is_grouped = B.ndim == (2 if fields["diagonal_B"] else 3) and n_groups > 1 and A is not None
    fits = n_groups * math.prod(factor.shape[-1] for factor, _ in factors) == shape.numel()
    block = KronBlock(shape, B, A, 0, saved_output_axes(dict(state), shape, of), **fields, approx=approx)
    if not fits or not (is_grouped or groups == {()}) or (A is not None and block.axes.sizes[-2] != B.shape[-1]):
        raise FileFormatError(f"the saved factors{of} do not fit its shape {tuple(shape)}.")
    n_inputs = saved.entry(state, "n_inputs", int, float, Tensor, of=of)
    if isinstance(n_inputs, Tensor):
        saved.floats(n_inputs.double(), f"number of inputs{of}", (n_groups, 1, 1), least=0)
    else:
        saved.number(state, "n_inputs", of=of, above=-1)
    return replace(block, n_inputs=n_inputs)


def at_least_one(n_inputs: float | Tensor) -> float | Tensor:
    """A number of inputs to divide by: with no inputs the sum is zero, and so is its mean."""
    if isinstance(n_inputs, Tensor):
        return torch.where(n_inputs == 0, 1, n_inputs)
    return n_inputs or 1


def of_groups(n_inputs: float | Tensor, *, is_diagonal: bool) -> float | Tensor:
    """A number of inputs, `[G, 1, 1]` where groups differ, in a shape that goes with factors, or with diagonals `[G, I]`."""
    return n_inputs.squeeze(-1) if isinstance(n_inputs, Tensor) and is_diagonal else n_inputs


def _eigenvalues(factor: Tensor | None, dtype: torch.dtype | None, like: Tensor) -> Tensor:
    if factor is None or dtype is None:
        return _eigen(factor, None, like)[0]
    return eigenvalues(factor, dtype, "a Kronecker factor")


def _eigen(factor: Tensor | None, dtype: torch.dtype | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
    if factor is None:  # a vector's block, B ⊗ 1
        return torch.ones(1, dtype=torch.float64, device=like.device), None
    if dtype is None:  # a diagonal
        return factor.double(), None
    values, vectors = eigh(factor, dtype, "a Kronecker factor")
    # eigenvalues enter logarithms and quotients; vectors that are rounded as the factor itself is turn by no more than it is uncertain
    return values, vectors.to(factor.dtype)
