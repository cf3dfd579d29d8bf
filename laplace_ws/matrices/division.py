"""Eigendecompositions of many blocks: divided among processes, or all at once before they are needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from laplace_ws.distributed import Processes
from laplace_ws.matrices.kron import Kron, KronBlock


def decompose(kron: Kron, processes: Processes, *, vectors: bool) -> None:
    """Compute the eigenvalues of all blocks, and with `vectors` their eigenvectors, each block on one of several processes.

    Afterwards every process holds all of them, to the same bits. One process alone computes them when they are needed.

    Raises:
        ProcessError: another process has failed.
    """
    if processes.size == 1:
        return
    blocks = list(kron.values())
    owners = divided([cost(block) for block in blocks], processes.size)
    with processes.together("the eigendecomposition of the factors"):
        results = [
            _parts(block, vectors) if owner == processes.rank else _room(block, vectors)
            for block, owner in zip(blocks, owners, strict=True)
        ]
        for rank in range(processes.size):
            of_rank = [parts for parts, owner in zip(results, owners, strict=True) if owner == rank]
            processes.broadcast_([part for parts in of_rank for part in parts if part is not None], rank)
    for block, (b, Q_B, a, Q_A) in zip(blocks, results, strict=True):
        assert b is not None
        assert a is not None
        block.accept((b, Q_B), (a, Q_A), vectors=vectors)


def decompose_now(kron: Kron, processes: Processes, *, progress_bar: bool = False) -> None:
    """Compute eigenvalues and eigenvectors of all blocks in one go, those of each block once.

    Raises:
        ProcessError: another process has failed.
    """
    if processes.size > 1:
        decompose(kron, processes, vectors=True)
        return
    hidden = not (progress_bar and sys.stderr.isatty())
    n_rows = [sum(factor.shape[-1] for factor in factors) for factors in kron.tensors_by_parameter().values()]
    with tqdm(total=sum(n_rows), desc="eigenvectors", unit="row", disable=hidden) as bar:
        for block, n in zip(kron.values(), n_rows, strict=True):
            _ = block.eigen
            bar.update(n)


def divided(costs: Sequence[float], n: int) -> list[int]:
    """Which of n processes does each task: the costliest first, each by the one that has least to do so far."""
    loads = [0.0] * n
    owners = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        owners[task] = loads.index(min(loads))
        loads[owners[task]] += costs[task]
    return owners


def cost(block: KronBlock) -> float:
    """In units of one multiplication, up to a constant."""
    factors = [(block.B, block.diagonal_B), *([] if block.A is None else [(block.A, block.diagonal_A)])]
    return sum(0 if is_diagonal else factor.numel() * factor.shape[-1] for factor, is_diagonal in factors)


_Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Eigenvalues and eigenvectors of B, then those of A."""


def _parts(block: KronBlock, vectors: bool) -> _Parts:
    if not vectors:
        b, a = block.factor_eigenvalues
        return b, None, a, None
    (b, Q_B), (a, Q_A) = block.eigen
    return b, Q_B, a, Q_A


def _room(block: KronBlock, vectors: bool) -> _Parts:
    """What `_parts` gives, without its values."""
    found: list[Tensor | None] = []
    for factor, is_diagonal in ((block.B, block.diagonal_B), (block.A, block.diagonal_A)):
        if factor is None:  # a vector's block, B ⊗ 1
            found += [block.B.new_empty(1, dtype=torch.float64), None]
            continue
        values = factor if is_diagonal else factor[..., 0]
        has_vectors = vectors and not is_diagonal
        found.append(torch.empty_like(values, dtype=torch.float64, memory_format=torch.contiguous_format))
        found.append(torch.empty_like(factor) if has_vectors else None)
    return tuple(found)  # type: ignore[return-value]
