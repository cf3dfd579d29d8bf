"""Sums over the data from which curvature matrices are made, whatever the backend.

Every accumulator sees, for each batch, the uses of the parameters once, then the back-propagated columns, a few at a time. What it keeps
is a sum over examples, so any split of the data gives the same result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac import factors
from laplace_ws.kfac.approximation import KfacApprox
from laplace_ws.kfac.sharing import EmbeddingUse, MatrixUse, Use, at_least_float32
from laplace_ws.matrices import CurvatureMatrix, Dense, Diag, Kron, KronBlock
from laplace_ws.matrices.kron import at_least_one

LARGEST_DENSE_VECTOR = 4096
"""Vectors (biases, scales, affine parameters) with more entries get the diagonal of their block, which would not fit in memory."""
LARGEST_DENSE_VOCABULARY = 8192
"""Embeddings with more rows have no dense input factor, which K-FAC-reduce needs; "auto" gives them K-FAC-expand."""

Gradients = Sequence[Float[Tensor, "K B ..."]]
"""One chunk of K columns, back-propagated to the output of each use."""


class Accumulator(ABC):
    """Sums curvature over batches.

    Args:
        parameters: the parameters to cover, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.parameters = {name: at_least_float32(p.detach()) for name, p in parameters.items()}
        self.shapes = {name: p.shape for name, p in parameters.items()}

    def start_batch(self, uses: Sequence[Use], output_ndim: int) -> None:  # noqa: B027 - most need nothing
        """Take note of the uses in the forward pass of a batch whose outputs have `output_ndim` dimensions."""

    @abstractmethod
    def add_columns(self, uses: Sequence[Use], g: Gradients) -> None:
        """Add back-propagated columns of the present batch."""

    @abstractmethod
    def result(self) -> CurvatureMatrix:
        """The curvature summed over all batches so far."""


class KronAccumulator(Accumulator):
    """Sums the Kronecker factors of every parameter.

    Args:
        parameters: the parameters to cover, by name.
        approximations: approximation of each parameter.
    """

    def __init__(self, parameters: Mapping[str, Tensor], approximations: Mapping[str, KfacApprox]):
        super().__init__(parameters)
        self.approximations = approximations
        self._blocks: dict[str, KronBlock] = {}
        self._roles: dict[str, _Role] = {}

    def start_batch(self, uses: Sequence[Use], output_ndim: int) -> None:
        """See `Accumulator.start_batch`; adds the input factors."""
        for name, parameter in self.parameters.items():
            own = [use for use in uses if name in use.parameters]
            role = _Role.of(name, parameter, own, self.approximations[name], output_ndim)
            self._roles[name] = role
            block = _empty_block(parameter, role, own)
            self._blocks[name] = self._blocks[name] + block if name in self._blocks else block

    def add_columns(self, uses: Sequence[Use], g: Gradients) -> None:
        """See `Accumulator.add_columns`; adds the gradient factors."""
        for name, role in self._roles.items():
            own = [(use, grad) for use, grad in zip(uses, g, strict=True) if name in use.parameters]
            self._blocks[name].B.add_(_gradient_gram(name, role, own))

    def result(self) -> Kron:
        """See `Accumulator.result`."""
        return Kron(self._blocks)


@dataclass(frozen=True)
class _Role:
    """How a parameter enters its uses, and what block that gives."""

    kind: str  # "matrix": a weight; "bias": of matrix uses alone; "vector": elementwise in at least one use
    approx: KfacApprox
    diagonal_A: bool = False
    diagonal_B: bool = False

    @classmethod
    def of(cls, name: str, parameter: Tensor, uses: Sequence[Use], approx: KfacApprox, output_ndim: int) -> _Role:
        if approx is KfacApprox.AUTO:
            too_large = any(isinstance(u, EmbeddingUse) and u.weight_shape[0] > LARGEST_DENSE_VOCABULARY for u in uses)
            approx = KfacApprox.EXPAND if output_ndim > 2 or too_large else KfacApprox.REDUCE
        kinds = {_kind(name, use) for use in uses}
        if "matrix" in kinds:
            return cls("matrix", approx, diagonal_A=_check_matrix_uses(name, uses, kinds, approx))
        kind = "bias" if kinds == {"bias"} else "vector"
        return cls(kind, approx, diagonal_B=parameter.numel() > LARGEST_DENSE_VECTOR)


def _kind(name: str, use: Use) -> str:
    if isinstance(use, MatrixUse):
        return "matrix" if name == use.weight else "bias"
    return "vector"


def _check_matrix_uses(name: str, uses: Sequence[Use], kinds: set[str], approx: KfacApprox) -> bool:
    """Whether the input factor is diagonal; raises where the uses of a weight share no Kronecker block."""
    forms = {(use.transposed, use.groups, use.diagonal_inputs) for use in uses if isinstance(use, MatrixUse)}
    if kinds != {"matrix"} or len(forms) > 1:
        calls = " and ".join(sorted({use.call for use in uses}))
        raise UnsupportedParameterError(
            f"{name!r} is used by {calls} in roles that share no Kronecker block; untie it, freeze it (requires_grad_(False)) "
            'or choose hessian_structure="diag".'
        )
    diagonal = any(form[2] for form in forms) and approx is KfacApprox.EXPAND
    vocabulary = max((use.weight_shape[0] for use in uses if isinstance(use, EmbeddingUse)), default=0)
    if not diagonal and vocabulary > LARGEST_DENSE_VOCABULARY:
        raise UnsupportedParameterError(
            f"K-FAC-reduce of {name!r} needs a dense input factor of {vocabulary}×{vocabulary} (limit {LARGEST_DENSE_VOCABULARY}); "
            f'choose kfac_approx={{"{name}": "expand"}} or freeze it (requires_grad_(False)).'
        )
    return diagonal


def _empty_block(parameter: Tensor, role: _Role, uses: Sequence[Use]) -> KronBlock:
    """A batch's block, with its input factor and no gradient columns yet."""
    if role.kind != "matrix":
        size = parameter.numel()
        B = parameter.new_zeros(size if role.diagonal_B else (size, size))
        return KronBlock(parameter.shape, B, diagonal_B=role.diagonal_B)
    matrix_uses = [use for use in uses if isinstance(use, MatrixUse)]
    first = matrix_uses[0]
    n_positions = factors.total(use.n_positions for use in matrix_uses)
    if role.approx is KfacApprox.REDUCE:
        n_inputs = first.n_examples
        A_sum = factors.input_gram_reduce([use.input_sum() for use in matrix_uses], n_positions)
    else:
        n_inputs = _number_of_inputs(n_positions, first.n_examples)
        A_sum = factors.total(
            use.input_sum().sum(0) if role.diagonal_A else factors.input_gram_expand(use.inputs())
            for use in matrix_uses
        )
    n_outputs = parameter.shape[-1 if first.transposed else 0] // first.groups
    B = parameter.new_zeros(*([first.groups] if first.groups > 1 else []), n_outputs, n_outputs)
    return KronBlock(
        parameter.shape,
        B,
        A_sum / at_least_one(n_inputs),
        n_inputs,
        transposed=first.transposed,
        diagonal_A=role.diagonal_A,
    )


def _number_of_inputs(n_positions: int | Tensor, n_examples: int) -> float | Tensor:
    """Number of positions in a batch, `[G, 1, 1]` where the groups have different ones."""
    if not isinstance(n_positions, Tensor):
        return n_positions * n_examples
    n = n_positions.sum(-1)
    return n.item() if n.ndim == 0 else n[:, None, None]


def _gradient_gram(name: str, role: _Role, uses: Sequence[tuple[Use, Tensor]]) -> Tensor:
    if role.kind == "vector" or role.diagonal_B:
        grads = factors.total(use.example_gradients(name, g) for use, g in uses).flatten(2)  # [K, N, D]
        return grads.square().sum((0, 1)) if role.diagonal_B else factors.gram(grads.flatten(0, 1))
    matrix_uses = [(use, g) for use, g in uses if isinstance(use, MatrixUse)]
    if role.approx is KfacApprox.EXPAND:
        by_position = (
            use.output_gradients(g) if role.kind == "matrix" else use.bias_gradients(g) for use, g in matrix_uses
        )
        return factors.total(factors.gradient_gram_expand(g) for g in by_position)
    sums = [use.output_gradient_sum(g) if role.kind == "matrix" else use.bias_gradient_sum(g) for use, g in matrix_uses]
    return factors.gradient_gram_reduce(sums)


class DiagAccumulator(Accumulator):
    """Sums the exact diagonal, Σ_n Σ_c (gradient of each weight)²."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__(parameters)
        self._diagonals = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def add_columns(self, uses: Sequence[Use], g: Gradients) -> None:
        """See `Accumulator.add_columns`."""
        for name, diagonal in self._diagonals.items():
            diagonal += example_gradients(name, uses, g).square().sum((0, 1))

    def result(self) -> Diag:
        """See `Accumulator.result`."""
        return Diag(self.shapes, torch.cat([d.flatten() for d in self._diagonals.values()]))


class DenseAccumulator(Accumulator):
    """Sums the full matrix, Σ_n Σ_c g gᵀ over all weights."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__(parameters)
        first = next(iter(self.parameters.values()))
        n_params = sum(shape.numel() for shape in self.shapes.values())
        self._matrix = torch.zeros(n_params, n_params, dtype=first.dtype, device=first.device)

    def add_columns(self, uses: Sequence[Use], g: Gradients) -> None:
        """See `Accumulator.add_columns`."""
        rows = [example_gradients(name, uses, g).flatten(2) for name in self.shapes]
        self._matrix += factors.gram(torch.cat(rows, dim=2).flatten(0, 1))

    def result(self) -> Dense:
        """See `Accumulator.result`."""
        return Dense(self.shapes, self._matrix)


def example_gradients(name: str, uses: Sequence[Use], g: Gradients) -> Float[Tensor, "K N ..."]:
    """Vector-Jacobian products of each example with respect to one parameter, all its uses together."""
    own = [(use, grad) for use, grad in zip(uses, g, strict=True) if name in use.parameters]
    return factors.total(use.example_gradients(name, grad) for use, grad in own)
