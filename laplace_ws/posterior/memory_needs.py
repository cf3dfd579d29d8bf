"""What predictions and samples take, and the error for those that would take more memory than is free, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from laplace_ws.matrices import Layout
from laplace_ws.memory import check_memory

NEGLIGIBLE = 2**24
"""Bytes below which nobody asks how much is free."""
_LEAST_BUDGET, _BUDGET_BY_WEIGHTS = 2**28, 8
_COPIES = 2  # a result and the parts that it is joined from
_FEWER_INPUTS = "give fewer inputs at a time"


def default_memory_budget(parameters: Iterable[Tensor]) -> int:
    """Bytes that the Jacobians of a prediction may take at a time where `memory_budget` is not given, by the parameters that are covered.

    A training step and Kronecker factors take several times the parameters too. A budget that does not grow with them would leave large
    networks one example at a time, which is slow.
    """
    return max(_LEAST_BUDGET, _BUDGET_BY_WEIGHTS * sum(p.numel() * p.element_size() for p in parameters))


def check_covariances(
    layout: Layout, n: int, output_shape: Sequence[int], element_size: int, device: torch.device, n_of_them: int = 1
) -> None:
    """Raise `NotEnoughMemoryError` for covariances of outputs in a layout.

    Args:
        layout: which covariances.
        n: N, the number of inputs.
        output_shape: of one of them.
        element_size: bytes of a number.
        device: where they are to be.
        n_of_them: under how many posterior precisions.
    """
    n_outputs = math.prod(output_shape)
    if layout is Layout.JOINT:
        size = n * n_outputs
        what = f"a joint covariance [{size:,}, {size:,}] of {n:,} inputs with {n_outputs:,} outputs each"
        _check(n_of_them * size**2 * element_size * _COPIES, device, what, f"leave out joint=True, or {_FEWER_INPUTS}")
    elif layout is Layout.EXAMPLE and output_shape:
        of_each = output_shape[-1]
        n_matrices = n * n_outputs // of_each
        what = f"a covariance [{of_each:,}, {of_each:,}] of outputs for each of {n_matrices:,} " + (
            "positions" if len(output_shape) > 1 else "inputs"
        )
        instead = 'choose diagonal_output=True for variances alone, or for classes link_approx="probit", which needs no more, or '
        _check(n_of_them * n_matrices * of_each**2 * element_size * _COPIES, device, what, instead + _FEWER_INPUTS)


def check_jacobians(n: int, n_outputs: int, n_params: int, element_size: int, device: torch.device) -> None:
    """Raise `NotEnoughMemoryError` for Jacobians `[N, D, P]`."""
    _check(
        n * n_outputs * n_params * element_size * _COPIES,
        device,
        f"a Jacobian [{n_outputs:,}, {n_params:,}] for each of {n:,} inputs",
        f"do without it by functional_moments, which never forms it, or {_FEWER_INPUTS}",
    )


def check_rows_of_full(n: int, n_outputs: int, n_params: int, device: torch.device) -> None:
    """Raise `NotEnoughMemoryError` for the rows of a Jacobian that are held at once where a matrix is over all weights."""
    _check(
        n * n_outputs * n_params * (8 + 8 + 4),  # in float64, solved for, and as they were
        device,
        f"a prediction by a full matrix, which needs {n * n_outputs:,} rows of a Jacobian over {n_params:,} weights at once,",
        f'choose hessian_structure="kron" or "diag", fewer weights by subset_of_weights, or {_FEWER_INPUTS}',
    )


def check_weight_samples(n_samples: int, n_params: int, element_size: int, device: torch.device) -> None:
    """Raise `NotEnoughMemoryError` for samples of the weights `[S, P]`."""
    _check(
        n_samples * n_params * element_size * _COPIES,
        device,
        f"a draw of {n_samples:,} samples of {n_params:,} weights",
        "draw fewer at a time",
    )


def check_output_samples(
    n_samples: int, n: int, output_shape: Sequence[int], element_size: int, device: torch.device
) -> None:
    """Raise `NotEnoughMemoryError` for samples of the outputs `[S, N, …]`."""
    shape = ", ".join(f"{size:,}" for size in (n, *output_shape))
    _check(
        n_samples * n * math.prod(output_shape) * element_size * _COPIES,
        device,
        f"a draw of {n_samples:,} samples of outputs [{shape}]",
        f"take a smaller n_samples, or {_FEWER_INPUTS}",
    )


def _check(n_bytes: int, device: torch.device, what: str, instead: str) -> None:
    if n_bytes > NEGLIGIBLE:
        check_memory(n_bytes, device, what, instead)
