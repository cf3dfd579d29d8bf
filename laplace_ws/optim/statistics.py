"""Kronecker factors of [W | b] from the batches of one step, and what they are in a Kronecker curvature."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.kfac import Accumulator, ConvUse, KfacApprox, MatrixUse, Use
from laplace_ws.kfac.accumulator import OutputGradients
from laplace_ws.kfac.conv_gram import PatchGram
from laplace_ws.kfac.factors import accumulated, mean_over_positions, total
from laplace_ws.kfac.uses import at_least_float32
from laplace_ws.matrices import Kron, KronBlock
from laplace_ws.optim.layers import Layer


@dataclass(frozen=True)
class FactorSums:
    """Sums from which the Kronecker factors of [W | b] are made, in the forms of its layer.

    Attributes:
        A: Σ a aᵀ over the inputs a, each with a 1 behind it where there is a bias.
        B: Σ g gᵀ.
        n_inputs: number of inputs, `[*G]` where the groups have different ones.
    """

    A: Tensor
    B: Tensor
    n_inputs: float | Tensor

    def __add__(self, other: FactorSums) -> FactorSums:
        return FactorSums(self.A + other.A, self.B + other.B, self.n_inputs + other.n_inputs)

    def with_B_times(self, factor: float) -> FactorSums:
        """The sums with another unit of the loss."""
        return self if factor == 1 else replace(self, B=self.B * factor)

    @property
    def mean_A(self) -> Tensor:
        """The mean of a aᵀ; zero where there are no inputs."""
        if not isinstance(self.n_inputs, Tensor):
            return self.A / (self.n_inputs or 1)
        return self.A / self.n_inputs.clamp(min=1).reshape(-1, *[1] * (self.A.ndim - 1))


class LayerAccumulator(Accumulator):
    """Sums the Kronecker factors of weights, each with its bias.

    Args:
        layers: of which weights.
        parameters: by name.
    """

    def __init__(self, layers: Sequence[Layer], parameters: Mapping[str, Tensor]):
        super().__init__({layer.weight: parameters[layer.weight] for layer in layers})
        self.layers: dict[str, Layer] = {layer.weight: layer for layer in layers}
        self._A: dict[str, Tensor] = {}
        self._B: dict[str, Tensor] = {}
        self._n_inputs: dict[str, float | Tensor] = {}

    def start_batch(self, uses: Sequence[Use], in_reduce_setting: Collection[str] = ()) -> None:
        """See `Accumulator.start_batch`; adds the input factors."""
        super().start_batch(uses, in_reduce_setting)
        for name, layer in self.layers.items():
            own = [use for use in uses if isinstance(use, MatrixUse) and use.weight == name]
            A, n_inputs = _reduced_inputs(layer, own) if layer.approx is KfacApprox.REDUCE else _inputs(layer, own)
            self._A[name] = accumulated(self._A.get(name), A)
            self._n_inputs[name] = self._n_inputs.get(name, 0) + n_inputs
        self._uses = [use.without_inputs() for use in uses]

    def _needs_example_gradients(self, name: str) -> bool:
        return False

    def _piece(self, name: str, gradients: OutputGradients) -> Tensor:
        layer, use, g = self.layers[name], gradients.use, gradients.g
        assert isinstance(use, MatrixUse)
        if layer.approx is KfacApprox.REDUCE:
            return use.output_gradient_sum(g)
        if layer.B.n_blocks > 1:
            return layer.B.gram(use.output_gradients(g).flatten(-4, -2))
        return use.output_gradient_gram(g)

    def _add_sum(self, name: str, pieces: Tensor) -> None:
        layer = self.layers[name]
        gram = layer.B.gram(pieces.flatten(-3, -2)) if layer.approx is KfacApprox.REDUCE else pieces
        self._B[name] = accumulated(self._B.get(name), gram)

    def sums(self, name: str) -> FactorSums:
        """Those of the layer of a weight."""
        return FactorSums(self._A[name], self._B[name], self._n_inputs[name])

    def result(self) -> Kron:
        """See `Accumulator.result`; the blocks of weights and biases."""
        blocks: dict[str, KronBlock] = {}
        for name, layer in self.layers.items():
            sums = self.sums(name)
            blocks |= kron_blocks(layer, sums.mean_A, sums.B, sums.n_inputs, self.shapes[name])
        return Kron(blocks)


def _inputs(layer: Layer, uses: Sequence[MatrixUse]) -> tuple[Tensor, float | Tensor]:
    """Σ a aᵀ over all positions, and their number."""
    n_inputs = total(use.n_inputs for use in uses)
    if layer.A.n_blocks > 1:
        rows = [use.inputs().flatten(-3, -2) for use in uses]
        A = total(layer.A.gram(_with_zeros(layer, r)) for r in rows)
    else:
        A = total(_input_gram(use) for use in uses)
        A = A if layer.bias is None else torch.nn.functional.pad(A, (0, 1, 0, 1))
    if layer.bias is not None:
        A = layer.A.with_ones(A, total(use.input_total() for use in uses), n_inputs)
    return A, n_inputs


def _reduced_inputs(layer: Layer, uses: Sequence[MatrixUse]) -> tuple[Tensor, float]:
    """Σ ā āᵀ over the means of the examples' inputs, and the number of examples."""
    means = mean_over_positions([use.input_sum() for use in uses], total(use.n_positions for use in uses))
    n = uses[0].n_examples
    A = layer.A.gram(_with_zeros(layer, means))
    return (A if layer.bias is None else layer.A.with_ones(A, means.sum(-2), n)), n


def _with_zeros(layer: Layer, rows: Float[Tensor, "*G M I"]) -> Float[Tensor, "*G M J"]:
    """Inputs with a column of zeros, in which `FactorForm.with_ones` puts the ones."""
    return rows if layer.bias is None else torch.nn.functional.pad(rows, (0, 1))


def _input_gram(use: MatrixUse) -> Tensor:
    """Σ a aᵀ, of a convolution by the cheapest way."""
    plan = use.plan if isinstance(use, ConvUse) else None
    if plan is None:
        return use.input_gram()
    assert isinstance(use, ConvUse)
    gram = PatchGram(plan)
    gram.add(at_least_float32(use.x))
    return gram.result()


def kron_blocks(
    layer: Layer, A: Tensor, B: Tensor, n_inputs: float | Tensor, shape: torch.Size
) -> dict[str, KronBlock]:
    """The blocks of W and b, by name, from the factors of [W | b].

    That of W is B ⊗ A without the row and column of the 1, that of b is B: the factors of `kron_factors`, up to terms between groups.

    Args:
        layer: how they act.
        A: mean of a aᵀ.
        B: Σ g gᵀ.
        n_inputs: number of inputs.
        shape: of W.
    """
    A, B = layer.A.to_dense(A), layer.B.to_dense(B)
    if layer.bias is not None:
        A = A[..., :-1, :-1]
    n_inputs = n_inputs[:, None, None] if isinstance(n_inputs, Tensor) else n_inputs
    options = {"output_axes": layer.output_axes, "diagonal_A": layer.A.is_diagonal, "approx": layer.approx.value}
    blocks = {layer.weight: KronBlock(shape, B, A, n_inputs, **options)}
    if layer.bias is not None:
        of_bias = torch.block_diag(*B) if layer.groups > 1 else B
        blocks[layer.bias] = KronBlock(torch.Size([len(of_bias)]), of_bias, approx=layer.approx.value)
    return blocks
