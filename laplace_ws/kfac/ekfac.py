"""Gradients of each example in the eigenvectors of a Kronecker product, and the eigenvalue correction computed from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.distributed import Processes
from laplace_ws.kfac.accumulator import Accumulator, OutputGradients
from laplace_ws.kfac.embedding_use import EmbeddingUse
from laplace_ws.kfac.uses import MatrixUse, Use
from laplace_ws.matrices import Ekfac, EkfacBlock
from laplace_ws.matrices.eigenbasis import EigenBasis


def rotated_gradients(basis: EigenBasis, name: str, use: Use, g: Float[Tensor, "K B ..."]) -> Float[Tensor, "K N ..."]:
    """`use.example_gradients` in coordinates of a basis, `[K, N, *G, O, I]`.

    (Σ_r g aᵀ) is rotated either as a whole or, where that takes fewer products, by rotating g and a before they are multiplied.
    """
    if not _turn_factors(basis, name, use, len(g)):
        gradients = use.example_gradients(name, g)
        return basis.rotate(gradients.reshape(*gradients.shape[:2], -1))
    assert isinstance(use, MatrixUse)
    rotated_g, rotated_a = basis.rotate_outputs(use.output_gradients(g)), basis.rotate_inputs(use.inputs())
    return torch.einsum("...knro,...nri->kn...oi", rotated_g, rotated_a)


def _turn_factors(basis: EigenBasis, name: str, use: Use, n_columns: int) -> bool:
    """Whether rotating the factors is cheaper; counts products for one example of one group."""
    if not isinstance(use, MatrixUse) or isinstance(use, EmbeddingUse) or name != use.weight or name == use.bias:
        return False
    n_positions = use.n_positions
    if isinstance(n_positions, Tensor):
        n_positions = int(n_positions.max())
    n_out, n_in = basis.sizes[-2:]
    of_factors = n_positions * (n_in**2 + n_columns * n_out**2)
    of_gradients = n_columns * n_out * n_in * (n_out + n_in)
    return of_factors < of_gradients


class EkfacAccumulator(Accumulator):
    """Sums the second moments of the gradients in given eigenvectors, Σ_n Σ_c (Qᵀ g)² [George et al. 2018].

    Args:
        parameters: the parameters to cover, by name.
        bases: the eigenvectors of each.
    """

    def __init__(self, parameters: Mapping[str, Tensor], bases: Mapping[str, EigenBasis]):
        super().__init__(parameters)
        self.bases = bases
        self._values = {name: p.new_zeros(bases[name].sizes) for name, p in self.parameters.items()}

    def _piece(self, name: str, gradients: OutputGradients) -> Tensor:
        return rotated_gradients(self.bases[name], name, gradients.use, gradients.g)

    def _add_sum(self, name: str, pieces: Tensor) -> None:
        self._values[name] += pieces.square().sum((0, 1))

    def sum_over(self, processes: Processes) -> None:
        """See `Accumulator.sum_over`."""
        processes.sum_(list(self._values.values()))

    def result(self) -> Ekfac:
        """See `Accumulator.result`."""
        items = self._values.items()
        return Ekfac({n: EkfacBlock(self.shapes[n], self.bases[n], values.clone()) for n, values in items})
