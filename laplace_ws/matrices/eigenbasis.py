"""The eigenvectors of a Kronecker block, as a coordinate system for vectors over its parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.matrices.axes import WeightAxes


@dataclass(frozen=True, eq=False)
class EigenBasis:
    """Q_B ⊗ Q_A: turns a vector over the flattened parameter into its coordinates `[*G, O, I]`, and back.

    Attributes:
        Q_B: eigenvectors of the gradient factor, `[*G, O, O]`; None for the identity.
        Q_A: eigenvectors of the input factor, `[*G, I, I]`; None for the identity.
        axes: which axes of the parameter are outputs; a vector over one that is no weight has its entries as outputs.
    """

    Q_B: Tensor | None
    Q_A: Tensor | None
    axes: WeightAxes

    @property
    def sizes(self) -> tuple[int, ...]:
        """`(*G, O, I)`."""
        return self.axes.sizes

    def equals(self, other: EigenBasis) -> bool:
        """Whether the eigenvectors are the same numbers."""
        if self is other:
            return True
        pairs = ((self.Q_B, other.Q_B), (self.Q_A, other.Q_A))
        return self.axes == other.axes and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
        )

    def rotate(self, vectors: Float[Tensor, "*S D"]) -> Float[Tensor, "*S *G O I"]:
        """Coordinates Qᵀ v, in the precision of the vectors."""
        x = self.axes.matrices(vectors)
        if self.Q_B is not None:
            x = _from_left(self.Q_B.mT.to(x.dtype), x)
        return x if self.Q_A is None else x @ self.Q_A.to(x.dtype)

    def rotate_back(self, coordinates: Float[Tensor, "*S *G O I"]) -> Float[Tensor, "*S D"]:
        """The vector Q x of coordinates x."""
        x = coordinates
        if self.Q_B is not None:
            x = _from_left(self.Q_B.to(x.dtype), x)
        if self.Q_A is not None:
            x = x @ self.Q_A.mT.to(x.dtype)
        return self.axes.vectors(x)

    def rotate_outputs(self, g: Float[Tensor, "*G ... O"]) -> Float[Tensor, "*G ... O"]:
        """Coordinates of vectors over the outputs; a group axis leads."""
        return _rotate_last(g, self.Q_B)

    def rotate_inputs(self, a: Float[Tensor, "*G ... I"]) -> Float[Tensor, "*G ... I"]:
        """Coordinates of vectors over the inputs; a group axis leads."""
        return _rotate_last(a, self.Q_A)

    def to_dense(self, values: Float[Tensor, "*G O I"]) -> Float[Tensor, "D D"]:
        """Q diag(values) Qᵀ."""
        coordinates = self.rotate(torch.eye(values.numel(), dtype=values.dtype, device=values.device))
        flat = coordinates.flatten(1)
        return (flat * values.flatten()) @ flat.mT

    def diagonal(self, values: Float[Tensor, "*G O I"]) -> Float[Tensor, " D"]:
        """The diagonal of Q diag(values) Qᵀ, from the squares of the eigenvectors' entries."""
        squares = EigenBasis(_square(self.Q_B), _square(self.Q_A), self.axes)
        return squares.rotate_back(values)


def _square(Q: Tensor | None) -> Tensor | None:
    return None if Q is None else Q.double().square()


def _from_left(Q: Float[Tensor, "*G O O"], x: Float[Tensor, "*S *G O I"]) -> Float[Tensor, "*S *G O I"]:
    """Q x; matrices of one column are turned by one product for all of them, and not by one each."""
    return (x.mT @ Q.mT).mT if Q.ndim == 2 and x.shape[-1] == 1 else Q @ x


def _rotate_last(x: Tensor, Q: Tensor | None) -> Tensor:
    if Q is None:
        return x
    Q = Q.to(x.dtype)
    if Q.ndim == 2:
        return x @ Q
    return x @ Q.reshape(len(Q), *(1,) * (x.ndim - 3), *Q.shape[1:])
