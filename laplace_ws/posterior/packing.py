"""The tensors of a curvature as files may store them: in half precision, and of symmetric matrices one triangle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws import saved
from laplace_ws.files import FileFormatError
from laplace_ws.values import shown

STORED: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
"""The types in which the tensors of a curvature can be stored."""
_FEWEST = 2**16
"""Entries of a tensor that is worth packing. Smaller ones take little of a file, and rounding would move their eigenvalues by more than a
decomposition allows for: the smaller the matrix, the more."""
_SYMMETRY = 1e-5
"""Largest asymmetry of a factor, relative to its largest entry, and of lengths of eigenvectors, that is the rounding of sums."""
_OF_ROUNDING = 2.0**-7
"""Largest change of such a length that is the rounding of bfloat16; it is taken back."""
_LARGEST_EXPONENT = 15
"""Of two, below which float16 holds all numbers."""
_PACKED = "packed tensor"
"""The entry that tells a packed tensor from the dictionaries around it."""


def stored_dtype(value: object) -> torch.dtype | None:
    """The option `dtype` of files, checked.

    Raises:
        TypeError: it is not one of `STORED` or None.
    """
    if value is None or (isinstance(value, torch.dtype) and value in STORED):
        return value
    known = ", ".join(map(str, STORED[:-1]))
    raise TypeError(
        f"dtype must be {known} or {STORED[-1]}, in which the curvature is stored, or None for its own, got {shown(value)}."
    )


def packed(state: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A nested dictionary with its large tensors packed: rounded to `dtype`, and of symmetric matrices the upper triangle.

    What is rounded is multiplied by a power of two first, so that its largest entry is nearly the largest that float16 has. Tensors with
    numbers that are not finite stay as they are, for the checks of whoever reads them.
    """
    return {key: _packed(value, dtype) for key, value in state.items()}


def unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary that `packed` was given, but for rounding; one that was not packed stays as it is.

    Raises:
        FileFormatError: a packed tensor is damaged.
    """
    return {key: _unpacked(key, value) for key, value in state.items()}


def _packed(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return packed(value, dtype)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < _FEWEST:
        return value
    largest = value.abs().max().item()
    if not math.isfinite(largest):
        return value
    is_triangle = _is_symmetric(value, largest)
    entries = _triangle((value + value.mT) / 2) if is_triangle else value
    exponent = 0
    if dtype.itemsize >= value.dtype.itemsize:
        dtype = value.dtype
    elif largest > 0:
        exponent = max(-1000, min(1000, _LARGEST_EXPONENT - math.frexp(largest)[1]))
    return {
        _PACKED: (entries.double() * 2.0**exponent).to(dtype) if exponent else entries.to(dtype),
        "shape": list(value.shape),
        "dtype": value.dtype,
        "is_triangle": is_triangle,
        "has_unit_columns": not is_triangle and _has_unit_columns(value, _SYMMETRY),
        "exponent": exponent,
    }


def _unpacked(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if not isinstance(value.get(_PACKED), Tensor):
        return unpacked(value)
    of = f" of packed {name!r}"
    shape, dtype = saved.entry(value, "shape", list, of=of), saved.entry(value, "dtype", torch.dtype, of=of)
    is_triangle, has_unit_columns = (
        saved.entry(value, field, bool, of=of) for field in ("is_triangle", "has_unit_columns")
    )
    exponent = saved.whole_number(value, "exponent", -1000, of=of)
    if not saved.is_shape(shape) or not dtype.is_floating_point or exponent > 1000:
        raise FileFormatError(f"the saved state is damaged: packed {name!r} has an impossible shape, type or exponent.")
    if is_triangle and (len(shape) < 2 or shape[-1] != shape[-2]):
        raise FileFormatError(f"the saved state is damaged: packed {name!r} is a triangle of what is not square.")
    lengths = (*shape[:-2], shape[-1] * (shape[-1] + 1) // 2) if is_triangle else tuple(shape)
    entries = saved.floats(value[_PACKED], f"packed {name!r}", lengths)
    entries = (entries.double() * 2.0**-exponent).to(dtype) if exponent else entries.to(dtype)
    if has_unit_columns:
        if not _has_unit_columns(entries, _OF_ROUNDING):
            raise FileFormatError(f"the saved packed {name!r} has columns whose length is not one.")
        entries = entries / torch.linalg.vector_norm(entries, dim=-2, keepdim=True)
    return _square(entries, shape[-1]) if is_triangle else entries


def _is_symmetric(value: Tensor, largest: float) -> bool:
    """Whether a tensor is a stack of square matrices that are symmetric up to rounding."""
    if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
        return False
    return (value - value.mT).abs().max().item() <= _SYMMETRY * largest


def _has_unit_columns(value: Tensor, tolerance: float) -> bool:
    """Whether a tensor is a stack of matrices whose columns have length one, as eigenvectors have."""
    return value.ndim >= 2 and bool((torch.linalg.vector_norm(value, dim=-2) - 1).abs().max() <= tolerance)


def _triangle(matrices: Float[Tensor, "*G D D"]) -> Float[Tensor, "*G E"]:
    """The upper triangle, row by row."""
    rows, columns = torch.triu_indices(*matrices.shape[-2:], device=matrices.device)
    return matrices[..., rows, columns]


def _square(triangle: Float[Tensor, "*G E"], n: int) -> Float[Tensor, "*G D D"]:
    """The symmetric matrices with these upper triangles."""
    rows, columns = torch.triu_indices(n, n, device=triangle.device)
    matrices = triangle.new_empty(*triangle.shape[:-1], n, n)
    matrices[..., rows, columns] = triangle
    matrices[..., columns, rows] = triangle
    return matrices
