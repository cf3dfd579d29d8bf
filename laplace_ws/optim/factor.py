"""The form in which a Kronecker factor is kept: whole, as its diagonal, or as blocks on its diagonal."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laplace_ws.errors import NumericalRepairWarning
from laplace_ws.kfac.factors import gram
from laplace_ws.kfac.uses import at_least_float32

_MOST_TRIES = 6
"""How often a damping is raised tenfold before an indefinite factor is given up."""


@dataclass(frozen=True)
class FactorForm:
    """How a D×D factor is kept, for each of the groups of a layer.

    Attributes:
        size: D.
        n_blocks: blocks of equal size b = ⌈D/n_blocks⌉ on its diagonal, `[*G, n_blocks, b, b]`, the last padded with zeros; of one block
            all of it, `[*G, D, D]`.
        is_diagonal: whether only its diagonal is kept, `[D]`.
    """

    size: int
    n_blocks: int = 1
    is_diagonal: bool = False

    @classmethod
    def of(cls, size: int, largest: int | None, *, is_diagonal: bool = False) -> FactorForm:
        """The form of a factor whose blocks have at most `largest` rows."""
        n_blocks = 1 if largest is None or is_diagonal else math.ceil(size / largest)
        return cls(size, n_blocks, is_diagonal)

    @property
    def block_size(self) -> int:
        """b."""
        return math.ceil(self.size / self.n_blocks)

    def gram(self, rows: Float[Tensor, "*G M D"]) -> Tensor:
        """Σ_m r_m r_mᵀ in this form; what lies outside its blocks is never computed."""
        return gram(self._in_blocks(rows)) if self.n_blocks > 1 else gram(rows)

    def with_ones(self, sums: Tensor, of_inputs: Float[Tensor, "*G I"], n_inputs: float | Tensor) -> Tensor:
        """Σ a aᵀ for inputs with a 1 behind them.

        Args:
            sums: the same with a 0 in place of the 1.
            of_inputs: Σ a over the I = D − 1 inputs.
            n_inputs: number of inputs, `[*G]` where the groups have different ones.
        """
        place = self.size - 1 - (self.n_blocks - 1) * self.block_size
        last = sums[..., -1, :, :] if self.n_blocks > 1 else sums
        cross = of_inputs[..., self.size - 1 - place :]
        last[..., :place, place] = last[..., place, :place] = cross
        last[..., place, place] = n_inputs
        return sums

    def damped_inverses(self, factors: Sequence[Tensor], dampings: Sequence[float], of: Sequence[str]) -> list[Tensor]:
        """`damped_inverse` of several factors of one type, at once where all are positive definite."""
        if len(factors) > 1 and not self.is_diagonal:
            X = at_least_float32(torch.stack(list(factors)))
            damping = X.new_tensor(dampings).view(-1, *[1] * (X.ndim - (4 if self.n_blocks > 1 else 3)))
            mean = self._mean(X, damping)
            root, info = torch.linalg.cholesky_ex(self._damped(X, damping, mean))
            if bool(torch.isfinite(mean).all() & (info == 0).all()):
                return list(torch.cholesky_inverse(root).to(factors[0].dtype).unbind())
        return [self.damped_inverse(X, damping, name) for X, damping, name in zip(factors, dampings, of, strict=True)]

    def damped_inverse(self, factor: Tensor, damping: float, of: str) -> Tensor:
        """(X + λ·(tr X/D)·I)⁻¹ in this form; that of a factor of zeros is the identity.

        Where rounding leaves the damped factor indefinite, λ is raised tenfold until it is not, with a `NumericalRepairWarning`.

        Args:
            factor: X.
            damping: λ.
            of: what it is a factor of, for messages.

        Raises:
            FloatingPointError: the factor is not finite, or not positive definite even so.
        """
        X = at_least_float32(factor)
        mean = self._mean(X, X.new_tensor(damping))
        if not bool(torch.isfinite(mean).all()):
            raise FloatingPointError(_not_finite(of))
        if self.is_diagonal:
            return (1 / (X + damping * mean)).to(factor.dtype)
        raised = damping
        for _ in range(_MOST_TRIES):
            root, info = torch.linalg.cholesky_ex(self._damped(X, raised, mean))
            if not bool(info.any()):
                if raised != damping:
                    warnings.warn(
                        f"a Kronecker factor of {of} is not positive definite with a damping of {damping:g}, and was given {raised:g}; "
                        "raise damping.",
                        NumericalRepairWarning,
                        stacklevel=2,
                    )
                return torch.cholesky_inverse(root).to(factor.dtype)
            raised = max(10 * raised, 10 * torch.finfo(X.dtype).eps)
        raise FloatingPointError(
            f"a Kronecker factor of {of} is not positive definite even with a damping of {raised / 10:g}; raise damping, or look for "
            "inputs of very unequal size."
        )

    def _mean(self, X: Tensor, damping: Tensor) -> Float[Tensor, "*G"]:
        """tr X/D; of a factor of zeros what makes its damped inverse the identity."""
        mean = self._diagonal(X).sum(-1) / self.size
        return torch.where(mean == 0, torch.where(damping > 0, 1 / damping, 1.0), mean)

    def _damped(self, X: Tensor, damping: float | Tensor, mean: Float[Tensor, "*G"]) -> Tensor:
        """X + λ·mean·I, in blocks where X is."""
        shift = (damping * mean)[..., None]
        damped = X.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(shift[..., None] if self.n_blocks > 1 else shift)
        return damped

    def times(self, matrix: Float[Tensor, "*G M D"], factor: Tensor) -> Float[Tensor, "*G M D"]:
        """The product of a matrix with a factor in this form."""
        if self.is_diagonal:
            return matrix * factor[..., None, :]
        if self.n_blocks == 1:
            return matrix @ factor
        product = self._in_blocks(matrix) @ factor  # [*G, n_blocks, M, b]
        return product.movedim(-3, -2).flatten(-2)[..., : self.size]

    def to_dense(self, factor: Tensor) -> Float[Tensor, "*G D D"]:
        """The factor in full; a diagonal as it is."""
        if self.n_blocks == 1:
            return factor
        out = factor.new_zeros(*factor.shape[:-3], self.size, self.size)
        for i, block in enumerate(factor.unbind(-3)):
            own = slice(i * self.block_size, min(self.size, (i + 1) * self.block_size))
            n = own.stop - own.start
            out[..., own, own] = block[..., :n, :n]
        return out

    def _in_blocks(self, rows: Float[Tensor, "*G M D"]) -> Float[Tensor, "*G n_blocks M b"]:
        padded = F.pad(rows, (0, self.n_blocks * self.block_size - self.size))
        return padded.unflatten(-1, (self.n_blocks, self.block_size)).movedim(-2, -3)

    def _diagonal(self, factor: Tensor) -> Float[Tensor, "*G _"]:
        if self.is_diagonal:
            return factor
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        return diagonal.flatten(-2) if self.n_blocks > 1 else diagonal


def check_finite(factors: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise `FloatingPointError` unless the Kronecker factors of each weight are finite."""
    sums = [torch.stack([t.sum().double() for t in of_weight]).sum() for of_weight in factors.values()]
    if sums and not bool(torch.isfinite(torch.stack(sums)).all()):  # one synchronisation for all
        for name, total in zip(factors, sums, strict=True):
            if not bool(torch.isfinite(total)):
                raise FloatingPointError(_not_finite(repr(name)))


def _not_finite(of: str) -> str:
    return f"the Kronecker factors of {of} are not finite; lower the learning rate, or look for NaN or infinity in the data."
