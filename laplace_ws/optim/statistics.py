"""Kronecker factors of [W | b] from the batches of one step, and their decayed averages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from laplace_ws.kfac import KfacApprox, KronAccumulator, MatrixUse, Use
from laplace_ws.kfac.factors import total
from laplace_ws.matrices.kron import at_least_one
from laplace_ws.optim.layers import Layer


@dataclass(frozen=True)
class LayerFactors:
    """Kronecker factors of [W | b] over one or several batches.

    Attributes:
        A: mean of a aᵀ over the inputs a, each with a 1 behind it where there is a bias; a diagonal as its entries.
        B: Σ g gᵀ.
        n_inputs: number of inputs, by group where they differ.
    """

    A: Float[Tensor, "*G J J"] | Float[Tensor, " J"]
    B: Float[Tensor, "*G O O"]
    n_inputs: float | Tensor

    def __add__(self, other: LayerFactors) -> LayerFactors:
        n_inputs = self.n_inputs + other.n_inputs
        A = (self.A * self.n_inputs + other.A * other.n_inputs) / n_inputs
        return LayerFactors(A, self.B + other.B, n_inputs)


class LayerAccumulator(KronAccumulator):
    """Sums the Kronecker factors of weights, and the inputs by which a factor of W becomes one of [W | b].

    Args:
        layers: of which parameters.
        parameters: by name.
        approximations: expand or reduce, by weight.
    """

    def __init__(
        self, layers: Sequence[Layer], parameters: Mapping[str, Tensor], approximations: Mapping[str, KfacApprox]
    ):
        weights = {layer.weight: parameters[layer.weight] for layer in layers}
        super().__init__(weights, {name: approximations[name] for name in weights})
        self._with_bias = [layer.weight for layer in layers if layer.bias is not None]
        self._input_sums: dict[str, Tensor] = {}

    def start_batch(self, uses: Sequence[Use], in_reduce_setting: Collection[str] = ()) -> None:
        """See `Accumulator.start_batch`."""
        for name in self._with_bias:
            own = [use for use in uses if isinstance(use, MatrixUse) and use.weight == name]
            sums: Tensor = total(use.input_sum() for use in own)  # [*G, N, I]
            if self.approximations[name] is KfacApprox.REDUCE:
                n_positions = total(use.n_positions for use in own)
                sums = sums / (n_positions.clamp(min=1)[..., None] if isinstance(n_positions, Tensor) else n_positions)
            self._input_sums[name] = sums.sum(-2)
        super().start_batch(uses, in_reduce_setting)

    def factors(self, layer: Layer) -> LayerFactors:
        """The factors of [W | b]."""
        block = self._sums[layer.weight].block()
        assert block.A is not None
        n_inputs = at_least_one(block.n_inputs)
        if layer.bias is None:
            return LayerFactors(block.A, block.B, n_inputs)
        mean = self._input_sums[layer.weight] / (n_inputs[..., 0] if isinstance(n_inputs, Tensor) else n_inputs)
        return LayerFactors(with_ones(block.A, mean), block.B, n_inputs)


def with_ones(A: Float[Tensor, "*G I I"], mean: Float[Tensor, "*G I"]) -> Float[Tensor, "*G J J"]:
    """The mean of a aᵀ for inputs with a 1 behind them, from that without and the mean of the inputs."""
    J = A.shape[-1] + 1
    out = A.new_ones(*A.shape[:-2], J, J)
    out[..., :-1, :-1] = A
    out[..., :-1, -1] = out[..., -1, :-1] = mean
    return out


def average(before: Tensor | None, now: Tensor, n: int, decay: float) -> Tensor:
    """The n-th (from 1) decayed average, in place: the k-th value counts as decay^(n−k), and all weights add up to one."""
    if before is None:
        return now.clone()
    return before.lerp_(now.to(before), (1 - decay) / (1 - decay**n))
