"""Checks of what a saved state holds: an entry is there and of its type, a number is one, a matrix can be a curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_ws.files import FileFormatError

_TOLERANCE = 1e-3
"""Largest asymmetry, or negative diagonal entry, that rounding may leave in a curvature, relative to its largest entry."""
_ROWS = 1024
"""Rows of a matrix that are compared with its columns at a time."""
_WORDS: dict[type | None, str] = {None: "None", Mapping: "a dictionary", Tensor: "a tensor", str: "a string"}


def entry(state: Any, name: str, *kinds: type | None, of: str = "") -> Any:
    """An entry of a saved dictionary.

    Args:
        state: the dictionary.
        name: of the entry.
        kinds: types of which it may be one, `None` for None; a bool is no int.
        of: what the dictionary is, as in " of '0.weight'", for the message.

    Raises:
        FileFormatError: it is missing or of another type.
    """
    if not isinstance(state, Mapping) or name not in state:
        raise FileFormatError(f"the saved state is damaged: {name!r}{of} is missing.")
    value = state[name]
    types = tuple(type(None) if kind is None else kind for kind in kinds)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in kinds):
        words = " or ".join(_WORDS.get(kind) or f"of type {kind.__name__}" for kind in kinds)  # type: ignore[union-attr]
        raise FileFormatError(f"the saved state is damaged: {name!r}{of} is a {type(value).__name__} and not {words}.")
    return value


def whole_number(state: Any, name: str, least: int, of: str = "") -> int:
    """An entry that counts something.

    Raises:
        FileFormatError: it is missing, no whole number, or too small.
    """
    value = entry(state, name, int, of=of)
    if value < least:
        raise FileFormatError(f"the saved state is damaged: {name!r}{of} is {value} and must be at least {least}.")
    return value


def number(state: Any, name: str, *, of: str = "", above: float = -math.inf) -> float:
    """A finite entry.

    Raises:
        FileFormatError: it is missing, no number, not finite, or not above a limit.
    """
    value = entry(state, name, int, float, of=of)
    if not (math.isfinite(value) and value > above):
        wanted = "finite" if above == -math.inf else f"finite and above {above:g}"
        raise FileFormatError(f"the saved state is damaged: {name!r}{of} is {value} and must be {wanted}.")
    return value


def floats(value: Any, what: str, shape: tuple[int, ...] | None = None, *, least: float = -math.inf) -> Tensor:
    """A tensor of finite real numbers.

    Args:
        value: what was saved.
        what: its name in messages.
        shape: that it must have; any where not given.
        least: what no entry may be below.

    Raises:
        FileFormatError: it is something else.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise FileFormatError(f"the saved {what} is {found} and not a tensor of real numbers.")
    if shape is not None and value.shape != shape:
        raise FileFormatError(f"the saved {what} has shape {list(value.shape)} in place of {list(shape)}.")
    if value.numel():
        low, high = (bound.item() for bound in value.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise FileFormatError(f"the saved {what} holds numbers that are not finite.")
        if low < least:
            raise FileFormatError(f"the saved {what} holds {low:.3g}, and no entry can be below {least:g}.")
    return value


def curvature(value: Any, what: str) -> Tensor:
    """A square matrix, or several along leading axes, that can be a curvature: symmetric, with no negative number on its diagonal.

    Raises:
        FileFormatError: it is something else.
    """
    value = floats(value, what)
    if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
        raise FileFormatError(f"the saved {what} has shape {list(value.shape)} and is not square.")
    if value.numel():
        limit = _TOLERANCE * value.abs().max()
        rows = range(0, value.shape[-1], _ROWS)
        pairs = ((value[..., i : i + _ROWS, :], value[..., i : i + _ROWS].mT) for i in rows)
        if not all((row - column).abs().max() <= limit for row, column in pairs):
            raise FileFormatError(f"the saved {what} is not symmetric.")
        if value.diagonal(dim1=-2, dim2=-1).min() < -limit:
            raise FileFormatError(f"the saved {what} has a negative number on its diagonal.")
    return value


def eigenvectors(value: Any, what: str, shape: tuple[int, ...]) -> Tensor:
    """A matrix whose columns have length one.

    Raises:
        FileFormatError: it is something else.
    """
    value = floats(value, what, shape)
    lengths = torch.linalg.vector_norm(value, dim=-2, dtype=torch.float64)
    if lengths.numel() and (lengths - 1).abs().max() > _TOLERANCE:
        raise FileFormatError(f"the saved {what} has columns whose length is not one.")
    return value


def shapes(state: Any, name: str, of: str = "") -> dict[str, torch.Size]:
    """An entry that gives shapes by name.

    Raises:
        FileFormatError: it is something else.
    """
    found = entry(state, name, Mapping, of=of)
    for key, shape in found.items():
        if not isinstance(key, str) or not is_shape(shape):
            raise FileFormatError(
                f"the saved state is damaged: {name!r}{of} holds {key!r}: {shape!r}, which is no shape."
            )
    return {key: torch.Size(shape) for key, shape in found.items()}


def is_shape(value: Any) -> bool:
    """Whether a value lists the lengths of axes."""
    return isinstance(value, (tuple, list)) and all(type(length) is int and length >= 0 for length in value)


def on_device(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A nested dictionary with its tensors on a device."""
    return {
        key: on_device(value, device)
        if isinstance(value, Mapping)
        else value.to(device)
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }
