"""Gradients of each example in the eigenvectors of a Kronecker product, and the eigenvalue correction computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.distributed import Processes
from laplace_ws.kfac.accumulator import Accumulator, OutputGradients
from laplace_ws.kfac.embedding_use import EmbeddingUse
from laplace_ws.kfac.roles import LARGEST_DENSE_VOCABULARY
from laplace_ws.kfac.uses import MatrixUse, Use
from laplace_ws.matrices import EigenBasis, Ekfac, EkfacBlock, Lookups, OuterProducts


def rotated_gradients(basis: EigenBasis, name: str, use: Use, g: Float[Tensor, "K B ..."]) -> Float[Tensor, "K N ..."]:
    """`use.example_gradients` in coordinates of a basis, `[K, N, *G, O, I]`.

    (Σ_r g aᵀ) is rotated either as a whole or, where that takes fewer products, by rotating g and a before they are multiplied.
    """
    products = outer_products(name, [(use, g)], basis)
    if products is None:
        gradients = use.example_gradients(name, g)
        return basis.rotate(gradients.reshape(*gradients.shape[:2], -1))
    return products.whole().transpose(0, 1).unflatten(-1, basis.sizes)


def outer_products(
    name: str, uses: Sequence[tuple[Use, Float[Tensor, "K B ..."]]], basis: EigenBasis | None
) -> OuterProducts | None:
    """The gradients of each example as sums of outer products, in coordinates of a basis.

    Args:
        name: of the parameter.
        uses: its uses, and columns at their outputs.
        basis: None for the parameter itself, flattened.

    Returns:
        None where they are not such sums, or are cheaper to rotate as a whole.
    """
    matrices = [use for use, _ in uses if _is_matrix(use, name)]
    groups = {use.groups for use in matrices}
    if len(matrices) < len(uses) or len(groups) > 1:
        return None
    if basis is None and not all(use.axes.is_row_major for use in matrices):
        return None
    if basis is not None and not _turn_factors(basis, matrices, len(uses[0][1])):
        return None
    turned_g, turned_a = [], []
    for use, (_, g) in zip(matrices, uses, strict=True):
        outputs, inputs = use.output_gradients(g), use.inputs()
        if basis is not None:
            outputs, inputs = basis.rotate_outputs(outputs), basis.rotate_inputs(inputs)
        if groups == {1}:
            outputs, inputs = outputs[None], inputs[None]
        turned_g.append(outputs.transpose(1, 2))
        turned_a.append(inputs)
    return OuterProducts(torch.cat(turned_g, dim=3), torch.cat(turned_a, dim=2))


def lookups(
    name: str, uses: Sequence[tuple[Use, Float[Tensor, "K B ..."]]], basis: EigenBasis | None
) -> Lookups | None:
    """The gradients of each example with respect to the table of an embedding, otherwise as `outer_products`."""
    of_table = [(use, g) for use, g in uses if isinstance(use, EmbeddingUse) and name == use.weight]
    if len(of_table) < len(uses) or (basis is not None and basis.Q_A is not None):
        return None
    found = [use.lookups(g) for use, g in of_table]
    index, g = torch.cat([index for index, _ in found], 1), torch.cat([g for _, g in found], 2)
    # the vectors of one index are summed where it occurs first
    first = (index[:, :, None] == index[:, None]).to(torch.uint8).argmax(-1)
    g = torch.zeros_like(g).scatter_add(2, first[:, None, :, None].expand_as(g), g)
    if basis is not None:
        g = basis.rotate_outputs(g)
    return Lookups(g, index, of_table[0][0].weight_shape[0], outputs_last=basis is None)


def has_small_rows(name: str, uses: Sequence[Use]) -> bool:
    """Whether the gradients of an example need not be formed in full, in whichever basis: `outer_products` or `lookups` gives them.

    Those of a table whose input factor may be dense, as K-FAC-reduce has it of a small vocabulary, are formed there.
    """
    own = [use for use in uses if name in use.parameters]
    if all(isinstance(use, EmbeddingUse) for use in own):
        return all(use.weight_shape[0] > LARGEST_DENSE_VOCABULARY for use in own if isinstance(use, EmbeddingUse))
    matrices = [use for use in own if _is_matrix(use, name)]
    return len(matrices) == len(own) and len({use.groups for use in matrices}) == 1


def _is_matrix(use: Use, name: str) -> TypeGuard[MatrixUse]:
    if not isinstance(use, MatrixUse) or isinstance(use, EmbeddingUse):
        return False
    return name == use.weight and name != use.bias


def _turn_factors(basis: EigenBasis, uses: Sequence[MatrixUse], n_columns: int) -> bool:
    """Whether rotating the factors is cheaper; counts products for one example of one group."""
    positions = [use.n_positions for use in uses]
    n_positions = sum(int(n.max()) if isinstance(n, Tensor) else n for n in positions)
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
