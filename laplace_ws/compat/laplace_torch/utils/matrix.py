"""Kronecker factors as laplace-torch holds them: a list with the factors of each parameter tensor, in the order of the model."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch leaves the types of split open

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws import matrices
from laplace_ws.compat.laplace_torch.utils.utils import _is_valid_scalar, symeig

__all__ = ["Kron", "KronDecomposed"]


def factors_of(kron: matrices.Kron) -> list[list[Tensor]]:
    """The factors of each block of ours, `[B, A]` or `[B]`; a block of several groups is one dense matrix."""
    return [_factors(block) for block in kron.blocks.values()]


def _factors(block: matrices.KronBlock) -> list[Tensor]:
    if block.is_grouped:
        return [block.to_dense()]
    if block.A is None:
        return [block.B]
    if block.axes.is_row_major:
        return [block.B, block.A]
    return [block.A, block.B] if len(block.shape) == 2 else [block.to_dense()]


class Kron:
    """The direct sum of Kronecker products, one for each parameter tensor.

    Args:
        kfacs: for each parameter tensor its two factors, or one matrix; a factor of one axis is a diagonal.
    """

    def __init__(self, kfacs: Sequence[Sequence[Tensor]]) -> None:
        self.kfacs: list[list[Tensor]] = [list(F) for F in kfacs]

    @classmethod
    def init_from_model(
        cls, model: nn.Module | Iterable[nn.Parameter], device: torch.device, dtype: torch.dtype
    ) -> Kron:
        """Factors of zeros for the parameters of a model: one matrix for a vector, two for all others."""
        parameters = model.parameters() if isinstance(model, nn.Module) else model
        sizes = [[len(p)] if p.ndim == 1 else [len(p), p.numel() // len(p)] for p in parameters]
        return cls([[torch.zeros(n, n, device=device, dtype=dtype) for n in of_one] for of_one in sizes])

    def __len__(self) -> int:
        return len(self.kfacs)

    def __add__(self, other: Kron) -> Kron:
        """Sums of the factors, not of their products."""
        if not isinstance(other, Kron):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"only factors add to factors, got a {type(other).__name__}.")
        pairs = zip(self.kfacs, other.kfacs, strict=True)
        return Kron([[a + b for a, b in zip(F, G, strict=True)] for F, G in pairs])

    def __mul__(self, scalar: float | Tensor) -> Kron:
        """The scaled matrix; each of two factors takes the root."""
        _check_scalar(scalar)
        return Kron([[scalar ** (1 / len(F)) * factor for factor in F] for F in self.kfacs])

    __radd__ = __add__
    __rmul__ = __mul__

    def decompose(self, damping: bool = False) -> KronDecomposed:
        """The eigenvectors and eigenvalues of every factor."""
        pairs = [[_eigen(factor) for factor in F] for F in self.kfacs]
        return KronDecomposed(
            [[Q for _, Q in F] for F in pairs], [[values for values, _ in F] for F in pairs], damping=damping
        )

    def bmm(self, W: Tensor, exponent: float = 1) -> Tensor:
        """The product with vectors over all weights, `[P]`, `[N, P]` or `[N, C, P]`."""
        if exponent != 1:
            raise ValueError("factors alone have no other powers; decompose() them first.")
        return _over_blocks(self._blocks(), W)

    def logdet(self) -> Float[Tensor, ""]:
        """Log determinant."""
        return torch.stack([block.logdet() for block in self._blocks()]).sum()

    def diag(self) -> Float[Tensor, " P"]:
        """Diagonal of the whole matrix."""
        parts = [[factor if factor.ndim == 1 else factor.diagonal() for factor in F] for F in self.kfacs]
        return torch.cat([F[0] if len(F) == 1 else torch.outer(*F).flatten() for F in parts])

    def to_matrix(self) -> Float[Tensor, "P P"]:
        """The matrix in full."""
        return torch.block_diag(*self._blocks())

    def _blocks(self) -> list[Tensor]:
        whole = [[torch.diag(factor) if factor.ndim == 1 else factor for factor in F] for F in self.kfacs]
        return [F[0] if len(F) == 1 else torch.kron(*F) for F in whole]


class KronDecomposed:
    """Kronecker products by their eigenvectors and eigenvalues, plus a multiple of the identity in each block.

    Args:
        eigenvectors: of each factor of each parameter tensor.
        eigenvalues: likewise.
        deltas: what is added to each block; zeros where not given.
        damping: add the root of it to the eigenvalues of each of two factors instead; it is lost where the matrix is scaled or added to.
    """

    def __init__(
        self,
        eigenvectors: Sequence[Sequence[Tensor]],
        eigenvalues: Sequence[Sequence[Tensor]],
        deltas: Tensor | None = None,
        damping: bool = False,
    ):
        self.eigenvectors = eigenvectors
        self.eigenvalues = eigenvalues
        self.deltas: Tensor = eigenvalues[0][0].new_zeros(len(self)) if deltas is None else deltas
        self.damping: bool = damping
        self._check_deltas(self.deltas)

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def detach(self) -> KronDecomposed:
        """Cut the graph of what is added."""
        self.deltas = self.deltas.detach()
        return self

    def __add__(self, deltas: Tensor) -> KronDecomposed:
        """With this much more on the diagonal: one number, or one for each block."""
        self._check_deltas(deltas)
        return KronDecomposed(self.eigenvectors, self.eigenvalues, self.deltas + deltas)

    def __mul__(self, scalar: float | Tensor) -> KronDecomposed:
        """The products scaled, and what is added to them left as it is."""
        _check_scalar(scalar)
        scaled = [[scalar ** (1 / len(F)) * values for values in F] for F in self.eigenvalues]
        return KronDecomposed(self.eigenvectors, scaled, self.deltas)

    __radd__ = __add__
    __rmul__ = __mul__

    def logdet(self) -> Float[Tensor, ""]:
        """Log determinant."""
        return torch.stack([values.log().sum() for values in self._spectra()]).sum()

    def bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        """A power of the matrix times vectors over all weights, `[P]`, `[N, P]` or `[N, C, P]`."""
        sizes = [values.numel() for values in self._spectra()]
        parts = []
        for part, values, Qs in zip(W.split(sizes, dim=-1), self._spectra(), self.eigenvectors, strict=True):
            parts.append(_turned(part, values**exponent, Qs))
        return torch.cat(parts, dim=-1)

    def inv_square_form(self, W: Float[Tensor, "N C P"]) -> Float[Tensor, "N C C"]:
        """W P⁻¹ Wᵀ."""
        return self.bmm(W) @ W.mT

    def diag(self, exponent: float = 1) -> Float[Tensor, " P"]:
        """Diagonal of a power of the matrix."""
        parts = []
        for values, Qs in zip(self._spectra(), self.eigenvectors, strict=True):
            squares, powers = [Q.square() for Q in Qs], values**exponent
            parts.append(squares[0] @ powers if len(Qs) == 1 else (squares[0] @ powers @ squares[1].mT).flatten())
        return torch.cat(parts)

    def to_matrix(self, exponent: float = 1) -> Float[Tensor, "P P"]:
        """A power of the matrix in full."""
        blocks = []
        for values, Qs in zip(self._spectra(), self.eigenvectors, strict=True):
            Q = Qs[0] if len(Qs) == 1 else torch.kron(*Qs)
            blocks.append((Q * (values**exponent).flatten()) @ Q.mT)
        return torch.block_diag(*blocks)

    def _spectra(self) -> list[Tensor]:
        """The eigenvalues of each block, `[O, I]` or `[O]`."""
        spectra = []
        for F, delta in zip(self.eigenvalues, self.deltas.expand(len(self)), strict=True):
            if len(F) == 1:
                spectra.append(F[0] + delta)
            elif self.damping:
                spectra.append(torch.outer(F[0] + delta.sqrt(), F[1] + delta.sqrt()))
            else:
                spectra.append(torch.outer(*F) + delta)
        return spectra

    def _check_deltas(self, deltas: Tensor) -> None:
        if not isinstance(deltas, Tensor) or deltas.shape not in ((), (1,), (len(self),)):  # pyright: ignore
            raise ValueError(f"what is added must be a tensor with one number or {len(self)}, one for each block.")


def _turned(vectors: Tensor, values: Tensor, Qs: Sequence[Tensor]) -> Tensor:
    """Q diag(values) Qᵀ v for each vector, with Q one matrix or a Kronecker product of two."""
    if len(Qs) == 1:
        return ((vectors @ Qs[0]) * values) @ Qs[0].mT
    x = vectors.unflatten(-1, values.shape)
    return (Qs[0] @ ((Qs[0].mT @ x @ Qs[1]) * values) @ Qs[1].mT).flatten(-2)


def _over_blocks(blocks: Sequence[Tensor], W: Tensor) -> Tensor:
    parts = W.split([len(block) for block in blocks], dim=-1)
    return torch.cat([part @ block.mT for part, block in zip(parts, blocks, strict=True)], dim=-1)


def _eigen(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a factor, of which a diagonal has the unit vectors."""
    return (
        (factor, torch.eye(len(factor), dtype=factor.dtype, device=factor.device))
        if factor.ndim == 1
        else symeig(factor)
    )


def _check_scalar(scalar: float | Tensor) -> None:
    if not _is_valid_scalar(scalar):
        raise ValueError(f"a matrix is multiplied by one number, got {scalar!r}.")
