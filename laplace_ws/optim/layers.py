"""Weights with a Kronecker block, each with the bias that is added to its outputs, as one matrix [W | b]."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac import EmbeddingUse, KfacApprox, MatrixUse, Use
from laplace_ws.kfac.roles import LARGEST_DENSE_VOCABULARY
from laplace_ws.matrices.axes import WeightAxes
from laplace_ws.optim.factor import FactorForm


@dataclass(frozen=True)
class Layer:
    """A weight, and how it acts: y = W a + b at each position, for each of G groups.

    Attributes:
        weight: name of W.
        bias: name of b, where there is one that belongs to this weight alone.
        output_axes: axes of W over its outputs, see `WeightAxes`.
        groups: G; each has a block of its own.
        approx: expand or reduce.
        A: form of the input factor of [W | b].
        B: form of the gradient factor.
    """

    weight: str
    bias: str | None
    output_axes: tuple[int, ...]
    groups: int
    approx: KfacApprox
    A: FactorForm
    B: FactorForm

    def as_matrices(self, weights: Float[Tensor, "K ..."], biases: Tensor | None) -> Float[Tensor, "K *G O J"]:
        """[W | b], or what belongs to them entry by entry, of K layers, with J = I + 1 columns where there are biases, else I."""
        matrices = self._axes(weights.shape[1:]).matrices(weights.flatten(1))
        if biases is None:
            return matrices
        return torch.cat([matrices, biases.reshape(*matrices.shape[:-1], 1)], -1)

    def from_matrices(
        self, matrices: Float[Tensor, "K *G O J"], shape: torch.Size
    ) -> tuple[Float[Tensor, "K ..."], Float[Tensor, "K D"] | None]:
        """What `as_matrices` put together: the parts of the weights, in their shape, and those of the biases, flat."""
        biases = None
        if self.bias is not None:
            matrices, biases = matrices[..., :-1], matrices[..., -1].flatten(1)
        axes = self._axes(shape)
        if axes.is_row_major and matrices.shape[1:] == shape:  # a view will do
            return matrices, biases
        return axes.vectors(matrices).reshape(-1, *shape), biases

    def _axes(self, shape: torch.Size) -> WeightAxes:
        return WeightAxes(shape, self.output_axes, self.groups)

    def precondition(self, matrix: Float[Tensor, "*G O J"], inv_A: Tensor, inv_B: Tensor) -> Float[Tensor, "*G O J"]:
        """B⁻¹ M A⁻¹."""
        return self.A.times(self.B.times(matrix.mT, inv_B).mT, inv_A)

    def state(self) -> dict[str, Any]:
        """The layer as plain values."""
        return asdict(self) | {"approx": self.approx.value}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Layer:
        """The layer of `state`."""
        A, B = FactorForm(**state["A"]), FactorForm(**state["B"])
        return cls(
            **{
                **state,
                "output_axes": tuple(state["output_axes"]),
                "approx": KfacApprox(state["approx"]),
                "A": A,
                "B": B,
            }
        )


def find_layers(
    uses: Sequence[Use],
    n_examples: int,
    refused: Collection[str],
    approximations: Mapping[str, KfacApprox],
    max_factor_dim: int | None,
) -> list[Layer]:
    """The weights that act as one linear map wherever they are used, with their biases.

    Args:
        uses: of all parameters, in one forward pass.
        n_examples: N of the batch.
        refused: parameters that have a use without a block.
        approximations: expand or reduce, by parameter.
        max_factor_dim: rows of the largest block of a factor.

    Raises:
        UnsupportedParameterError: a weight cannot have K-FAC-reduce, as which example its rows belong to is not known, or as a factor
            would be too large.
    """
    by_name: dict[str, list[Use]] = {}
    for use in uses:
        for name in use.parameters:
            by_name.setdefault(name, []).append(use)
    layers = []
    for name, approx in approximations.items():
        own = [use for use in by_name.get(name, []) if isinstance(use, MatrixUse) and use.weight == name]
        forms = {(use.output_axes, use.groups, use.diagonal_inputs) for use in own}
        if name in refused or len(forms) != 1 or len(own) < len(by_name[name]):  # none, several, or another role beside
            continue
        ((output_axes, groups, diagonal_inputs),) = forms
        if approx is KfacApprox.REDUCE:
            _check_reduce(name, own, n_examples, max_factor_dim)
        bias = None if diagonal_inputs else _bias_of(own, by_name, refused)
        n_outputs, n_inputs = own[0].axes.sizes[-2:]
        A = FactorForm.of(
            n_inputs + (bias is not None), max_factor_dim, is_diagonal=diagonal_inputs and approx is KfacApprox.EXPAND
        )
        layers.append(Layer(name, bias, output_axes, groups, approx, A, FactorForm.of(n_outputs, max_factor_dim)))
    return layers


def _bias_of(own: Sequence[MatrixUse], by_name: Mapping[str, Sequence[Use]], refused: Collection[str]) -> str | None:
    """The bias of every use of a weight, and of no other use."""
    biases = {use.bias for use in own}
    bias = biases.pop() if len(biases) == 1 else None
    if bias is None or bias in refused or len(by_name[bias]) > len(own):
        return None
    return bias


def _check_reduce(name: str, uses: Sequence[MatrixUse], n_examples: int, max_factor_dim: int | None) -> None:
    if any(use.n_examples != n_examples for use in uses):
        raise UnsupportedParameterError(
            f"K-FAC-reduce of {name!r} needs to know which of the {n_examples} examples each of its {uses[0].rows.n_rows} rows belongs to; "
            f'declare it by laplace_ws.row_examples(index), with inputs that have a length, or choose kfac_approx={{"{name}": "expand"}}.'
        )
    vocabulary = max((use.weight_shape[0] for use in uses if isinstance(use, EmbeddingUse)), default=0)
    if vocabulary > LARGEST_DENSE_VOCABULARY and max_factor_dim is None:
        raise UnsupportedParameterError(
            f"K-FAC-reduce of {name!r} needs a dense input factor of {vocabulary}×{vocabulary} (limit {LARGEST_DENSE_VOCABULARY}); "
            f'give a max_factor_dim, or choose kfac_approx={{"{name}": "expand"}}.'
        )
