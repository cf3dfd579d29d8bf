"""Covariances J Σ Jᵀ of linear functions of the weights, summed over the parameter tensors so that J is never formed in full."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.matrices.rows import Lookups, OuterProducts

Damping = tuple[Tensor, Tensor]
"""The scale s and the δ of a covariance Σ = (s·H + diag(δ))⁻¹."""

_FLOAT64 = 2.0  # cost of a product in float64, in those of float32
_PASSES = 10  # cost of reading and writing rows, in products

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

    @property
    def forms_rows(self) -> bool:
        """Whether `add_products` and `add_lookups` form the rows in full."""
        return True

    @abstractmethod
    def add(self, name: str, rows: Float[Tensor, "N K D"]) -> None:
        """Add the part of one parameter tensor, given its rows of J: K outputs of N examples."""

    def add_products(self, name: str, products: OuterProducts) -> None:
        """`add` with rows in this form."""
        self.add(name, products.whole())

    def add_lookups(self, name: str, lookups: Lookups) -> None:
        """`add` with rows in this form."""
        self.add(name, lookups.whole())

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
        variances: `variances(name, s, δ)`: the diagonal of Σ in these coordinates, float64.
        dampings: see `Pushforward`.
        layout: see `Pushforward`.
    """

    def __init__(self, variances: VariancesOf, dampings: Sequence[Damping], layout: Layout):
        super().__init__(dampings, layout)
        self._variances = variances
        self._sums: list[Tensor] | None = None

    @property
    def forms_rows(self) -> bool:
        """See `Pushforward.forms_rows`."""
        return self.layout is Layout.JOINT

    def add(self, name: str, rows: Float[Tensor, "N K D"]) -> None:
        """See `Pushforward.add`; the variances for all dampings take a single product."""
        self._add(self._covariances(rows, [v.to(rows.dtype) for v in self._of_dampings(name)]))

    def add_products(self, name: str, products: OuterProducts) -> None:
        """See `Pushforward.add_products`; never forms more of the rows than a part."""
        if self.forms_rows:
            super().add_products(name, products)
            return
        n_groups, n_outputs, n_inputs = len(products.g), products.g.shape[-1], products.a.shape[-1]
        variances = [v.expand(n_groups * n_outputs * n_inputs) for v in self._of_dampings(name)]
        variances = [v.reshape(n_groups, n_outputs, n_inputs) for v in variances]
        if _pairs_are_cheaper(products, len(variances)):
            self._add([self._of_pairs(products, v) for v in variances])
            return
        at_once = max(1, _elements_at_once(products.g.device) // products.entries_per_output)
        for start in range(0, n_outputs, at_once):
            part = products.of_outputs(start, start + at_once).movedim(0, 2).flatten(2)
            of_part = [v[:, start : start + at_once].flatten().to(part.dtype) for v in variances]
            self._add(self._covariances(part, of_part))

    def add_lookups(self, name: str, lookups: Lookups) -> None:
        """See `Pushforward.add_lookups`; forms none of the zeros."""
        if self.forms_rows:
            super().add_lookups(name, lookups)
            return
        n_weights = lookups.n_indices * lookups.g.shape[-1]
        of_entries = [lookups.entries(v.expand(n_weights)) for v in self._of_dampings(name)]
        rows = lookups.g.flatten(2)
        self._add([self.gram(rows, v.to(rows.dtype).flatten(1)[:, None]) for v in of_entries])

    def _of_dampings(self, name: str) -> list[Float[Tensor, " D"]]:
        return [self._variances(name, *damping) for damping in self.dampings]

    def _covariances(self, rows: Float[Tensor, "N K D"], variances: Sequence[Float[Tensor, " D"]]) -> list[Tensor]:
        if self.layout is Layout.DIAGONAL:
            squares = rows.square() @ torch.stack([v.expand(rows.shape[-1]) for v in variances], dim=1)
            return list(squares.unbind(-1))
        return [self.gram(rows, v) for v in variances]

    def _of_pairs(self, products: OuterProducts, variances: Float[Tensor, "G O I"]) -> Tensor:
        """The covariance as a sum over pairs of positions, Σ_rs Σ_o g_ro g_so Σ_i v_oi a_ri a_si, for as many examples as memory allows.

        In float64, as such sums cancel where the rows, whose squares they stand for, are small beside their terms.
        """
        n_positions = products.a.shape[2]
        r, s = torch.triu_indices(n_positions, n_positions, device=variances.device)
        pair = torch.empty(n_positions, n_positions, dtype=torch.long, device=variances.device)
        pair[r, s] = pair[s, r] = torch.arange(len(r), device=variances.device)
        at_once = max(
            1, _elements_at_once(variances.device) // max(1, len(r) * variances.shape[0] * variances.shape[2])
        )
        parts = []
        for g, a in zip(products.g.double().split(at_once, 1), products.a.double().split(at_once, 1), strict=True):
            of_pairs = (a[:, :, r] * a[:, :, s]).flatten(1, 2) @ variances.double().mT  # [G, N·P, O]
            between = of_pairs.unflatten(1, (-1, len(r)))[:, :, pair].movedim(-1, 2)  # [G, N, O, R, R]
            by_output = g.movedim(-1, 2)  # [G, N, O, K, R]
            weighted = by_output @ between
            if self.layout is Layout.DIAGONAL:
                parts.append((weighted * by_output).sum((0, 2, 4)))
            else:
                parts.append((weighted.movedim(3, 2).flatten(3) @ by_output.movedim(3, 2).flatten(3).mT).sum(0))
        return torch.cat(parts).to(products.g.dtype)

    def _add(self, parts: list[Tensor]) -> None:
        self._sums = parts if self._sums is None else [s + part for s, part in zip(self._sums, parts, strict=True)]

    def result(self) -> list[Tensor]:
        """See `Pushforward.result`."""
        assert self._sums is not None
        sums, self._sums = self._sums, None
        return sums


def _pairs_are_cheaper(products: OuterProducts, n_dampings: int) -> bool:
    """Whether the sum over pairs of positions is cheaper than one over weights; counts products for one weight of one example."""
    n_rows, n_positions = products.g.shape[2], products.a.shape[2]
    n_pairs = n_positions * (n_positions + 1) // 2
    return 0 < n_pairs * n_dampings * _FLOAT64 <= n_rows * (n_positions + _PASSES + n_dampings)


def _elements_at_once(device: torch.device) -> int:
    """How much of the rows to form at once: on a CPU what its caches hold, elsewhere some megabytes, as little beside `memory_budget`."""
    return 2**18 if device.type == "cpu" else 2**20


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
