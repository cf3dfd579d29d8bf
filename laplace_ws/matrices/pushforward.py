"""Covariances J Σ Jᵀ of linear functions of the weights, summed over the parameter tensors so that J is never formed in full."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor

Damping = tuple[Tensor, Tensor]
"""The scale s and the δ of a covariance Σ = (s·H + diag(δ))⁻¹."""


VariancesOf = Callable[[str, Tensor, Tensor], Float[Tensor, " D"]]
"""From the name of a parameter tensor and a damping, a diagonal of Σ."""


class Layout(Enum):
    """Which covariances are wanted: of the K outputs of each example, of all outputs of all examples, or variances only."""

    EXAMPLE = "example"
    JOINT = "joint"
    DIAGONAL = "diagonal"


class Pushforward(ABC):
    """Sums J Σ Jᵀ over the parameter tensors, for several Σ at once.

    Rows of J are in the coordinates of the matrix (`CurvatureMatrix.basis`). Everything is differentiable in the rows and in the dampings.

    Args:
        dampings: (s, δ) of each Σ.
        layout: which covariances are wanted.
    """

    def __init__(self, dampings: Sequence[Damping], layout: Layout):
        self.dampings = dampings
        self.layout = layout

    @abstractmethod
    def add(self, name: str, rows: Float[Tensor, "N K D"]) -> None:
        """Add the part of one parameter tensor, given its rows of J: K outputs of N examples."""

    def add_outer(self, name: str, g: Float[Tensor, "N K O"], a: Float[Tensor, "N I"]) -> None:
        """`add` with the rows g aᵀ, `[O, I]` each."""
        self.add(name, (g[..., None] * a[:, None, None]).flatten(2))

    @abstractmethod
    def result(self) -> list[Tensor]:
        """For each Σ the covariance `[N, K, K]`, `[N·K, N·K]` or `[N, K]`; the sums are then reset."""

    def gram(self, rows: Float[Tensor, "N K D"], weights: Tensor | None = None) -> Tensor:
        """Σ_d w_d j_d j_d in the layout."""
        weighted = rows if weights is None else rows * weights
        if self.layout is Layout.DIAGONAL:
            return (weighted * rows).sum(-1)
        if self.layout is Layout.JOINT:
            return weighted.flatten(0, 1) @ rows.flatten(0, 1).mT
        return weighted @ rows.mT


class SeparablePushforward(Pushforward):
    """For matrices that are diagonal in separate coordinates for each parameter tensor.

    Args:
        variances: `variances(name, s, δ)`: the diagonal of Σ in these coordinates.
        dampings: see `Pushforward`.
        layout: see `Pushforward`.
    """

    def __init__(self, variances: VariancesOf, dampings: Sequence[Damping], layout: Layout):
        super().__init__(dampings, layout)
        self._variances = variances
        self._sums: list[Tensor] | None = None

    def add(self, name: str, rows: Float[Tensor, "N K D"]) -> None:
        """See `Pushforward.add`; the variances for all dampings take a single product."""
        variances = [self._variances(name, *damping).to(rows.dtype) for damping in self.dampings]
        if self.layout is Layout.DIAGONAL:
            squares = rows.square() @ torch.stack([v.expand(rows.shape[-1]) for v in variances], dim=1)
            self._add(list(squares.unbind(-1)))
        else:
            self._add([self.gram(rows, v) for v in variances])

    def add_outer(self, name: str, g: Float[Tensor, "N K O"], a: Float[Tensor, "N I"]) -> None:
        """See `Pushforward.add_outer`; with one position the inputs only weight the outputs, and no row is formed."""
        if self.layout is Layout.JOINT:
            super().add_outer(name, g, a)
            return
        squares = a.square()
        parts = []
        for damping in self.dampings:
            variances = self._variances(name, *damping).to(g.dtype).reshape(g.shape[-1], a.shape[-1])
            parts.append(self.gram(g, (squares @ variances.mT)[:, None]))
        self._add(parts)

    def _add(self, parts: list[Tensor]) -> None:
        self._sums = parts if self._sums is None else [s + part for s, part in zip(self._sums, parts, strict=True)]

    def result(self) -> list[Tensor]:
        """See `Pushforward.result`."""
        assert self._sums is not None
        sums, self._sums = self._sums, None
        return sums


class _WholePushforward(Pushforward):
    """For a Σ over all weights: the rows of the parameter tensors are kept until all have arrived, in the order of the matrix."""

    def __init__(self, dampings: Sequence[Damping], layout: Layout):
        super().__init__(dampings, layout)
        self._rows: list[Tensor] = []

    def add(self, name: str, rows: Float[Tensor, "N K D"]) -> None:
        """See `Pushforward.add`."""
        self._rows.append(rows)

    def result(self) -> list[Tensor]:
        """See `Pushforward.result`."""
        rows = torch.cat(self._rows, dim=2)
        self._rows = []
        return [covariance.to(rows.dtype) for covariance in self._covariances(rows.double())]

    @abstractmethod
    def _covariances(self, rows: Float[Tensor, "N K P"]) -> list[Tensor]:
        """J Σ Jᵀ for each Σ."""


class RotatedPushforward(_WholePushforward):
    """For H = Q diag(l) Qᵀ and dampings of one number each.

    Args:
        values: l, float64.
        vectors: Q, float64.
        dampings: see `Pushforward`.
        layout: see `Pushforward`.
    """

    def __init__(
        self, values: Float[Tensor, " P"], vectors: Float[Tensor, "P P"], dampings: Sequence[Damping], layout: Layout
    ):
        super().__init__(dampings, layout)
        self._values, self._vectors = values, vectors

    def _covariances(self, rows: Float[Tensor, "N K P"]) -> list[Tensor]:
        rotated = rows @ self._vectors
        return [self.gram(rotated, 1 / (self._values * s.double() + delta.double())) for s, delta in self.dampings]


class DensePushforward(_WholePushforward):
    """For dampings of any kind, from the Cholesky factors of the precisions.

    Args:
        factors: lower Cholesky factor of s·H + diag(δ) for each damping.
        dampings: see `Pushforward`.
        layout: see `Pushforward`.
    """

    def __init__(self, factors: Sequence[Float[Tensor, "P P"]], dampings: Sequence[Damping], layout: Layout):
        super().__init__(dampings, layout)
        self._factors = factors

    def _covariances(self, rows: Float[Tensor, "N K P"]) -> list[Tensor]:
        columns = rows.flatten(0, 1).mT
        whitened = [torch.linalg.solve_triangular(L, columns, upper=False).mT for L in self._factors]
        return [self.gram(w.reshape(rows.shape)) for w in whitened]


class LowRankPushforward(Pushforward):
    """For Σ = Δ⁻¹ − Δ⁻¹ U T Tᵀ Uᵀ Δ⁻¹, with k columns U.

    Sums in float64, as the result is the difference of two sums of similar size. Where each parameter tensor has one δ, the products with
    its rows are computed once for all dampings.

    Args:
        vectors: U of each parameter tensor by name, `[D, k]`.
        roots: T `[k, k]` for each damping, float64.
        deltas: δ of each parameter tensor by name (a scalar, or one per weight), for each damping.
        dampings: see `Pushforward`.
        layout: see `Pushforward`.
    """

    def __init__(
        self,
        vectors: Mapping[str, Tensor],
        roots: Sequence[Tensor],
        deltas: Sequence[Mapping[str, Tensor]],
        dampings: Sequence[Damping],
        layout: Layout,
    ):
        super().__init__(dampings, layout)
        self._vectors, self._roots, self._deltas = vectors, roots, deltas
        self._of_prior: list[Tensor | None] = [None] * len(dampings)
        self._projected: list[Tensor | None] = [None] * len(dampings)
        self._dtype = torch.float64

    def add(self, name: str, rows: Float[Tensor, "N K D"]) -> None:
        """See `Pushforward.add`."""
        self._dtype = rows.dtype
        rows, vectors = rows.double(), self._vectors[name].double()
        deltas = [delta[name].double() for delta in self._deltas]
        if all(delta.ndim == 0 for delta in deltas):
            gram, projected = self.gram(rows), rows @ vectors
            parts = [(gram / delta, projected / delta) for delta in deltas]
        else:
            parts = [(self.gram(rows, 1 / delta), (rows / delta) @ vectors) for delta in deltas]
        for i, (gram, projected) in enumerate(parts):
            self._of_prior[i] = _plus(self._of_prior[i], gram)
            self._projected[i] = _plus(self._projected[i], projected)

    def result(self) -> list[Tensor]:
        """See `Pushforward.result`."""
        results = []
        for prior, projected, root in zip(self._of_prior, self._projected, self._roots, strict=True):
            assert prior is not None
            assert projected is not None
            results.append((prior - self.gram(projected @ root)).to(self._dtype))
        self._of_prior, self._projected = [None] * len(results), [None] * len(results)
        return results


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part
