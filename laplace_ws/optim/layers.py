"""Weights with a Kronecker block, each with the bias that is added to its outputs, as one matrix [W | b]."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.kfac import MatrixUse, Use


@dataclass(frozen=True)
class Layer:
    """A weight, and how it acts: y = W a + b at each position, for each of G groups.

    Attributes:
        weight: name of W.
        bias: name of b, where there is one that belongs to this weight alone.
        transposed: whether the first axis of W holds inputs, not outputs.
        groups: G; each has a block of its own.
    """

    weight: str
    bias: str | None
    transposed: bool
    groups: int

    def as_matrix(self, weight: Tensor, bias: Tensor | None) -> Float[Tensor, "*G O J"]:
        """[W | b], or what belongs to them entry by entry, with J = I + 1 columns where there is a bias, else I."""
        matrix = weight.mT if self.transposed else weight.flatten(1)
        if self.groups > 1:
            matrix = matrix.unflatten(0, (self.groups, -1))
        if bias is None:
            return matrix
        return torch.cat([matrix, bias.reshape(*matrix.shape[:-1], 1)], -1)

    def from_matrix(self, matrix: Float[Tensor, "*G O J"], shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """What `as_matrix` put together: the part of the weight, in its shape, and that of the bias, flat."""
        bias = None
        if self.bias is not None:
            matrix, bias = matrix[..., :-1], matrix[..., -1].flatten()
        if self.groups > 1:
            matrix = matrix.flatten(0, 1)
        return (matrix.mT if self.transposed else matrix).reshape(shape), bias


def find_layers(uses: Sequence[Use], parameters: Mapping[str, nn.Parameter], refused: Collection[str]) -> list[Layer]:
    """The weights that act as one linear map wherever they are used, with their biases.

    Args:
        uses: of all parameters, in one forward pass.
        parameters: by name.
        refused: those that have a use without a block.
    """
    layers = []
    for name in parameters:
        own = _matrix_uses(uses, name)
        forms = {(use.transposed, use.groups) for use in own if use.weight == name}
        if name in refused or len(forms) != 1 or any(use.weight != name for use in own):
            continue
        if len(own) < sum(name in use.parameters for use in uses):  # it has another role beside
            continue
        ((transposed, groups),) = forms
        layers.append(Layer(name, _bias_of(own, uses, refused), transposed, groups))
    return layers


def _matrix_uses(uses: Iterable[Use], name: str) -> list[MatrixUse]:
    return [use for use in uses if isinstance(use, MatrixUse) and name in use.parameters]


def _bias_of(own: Sequence[MatrixUse], uses: Sequence[Use], refused: Collection[str]) -> str | None:
    """The bias of every use of a weight, and of no other use."""
    biases = {use.bias for use in own}
    bias = biases.pop() if len(biases) == 1 else None
    if bias is None or bias in refused or any(use.diagonal_inputs for use in own):
        return None
    return bias if sum(bias in use.parameters for use in uses) == len(own) else None
