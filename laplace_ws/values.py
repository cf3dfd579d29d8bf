"""Checks of single values that users give: numbers, flags, generators. Each error names the option and what was given."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def whole_number(name: str, value: Any, *, least: int | None = None) -> int:
    """A whole number, as Python's own.

    Raises:
        TypeError: it is something else.
        ValueError: it is below `least`.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {shown(value)}.") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


def real_number(
    name: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf, finite: bool = True
) -> float:
    """A number, as Python's own.

    Args:
        name: of the option.
        value: what was given.
        above: it must be greater than this.
        at_least: it must be no less than this.
        finite: whether it must be finite.

    Raises:
        TypeError: it is something else.
        ValueError: it is outside the limits, or NaN where there are any.
    """
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several numbers
        raise TypeError(f"{name} must be a number, got {shown(value)}.") from None
    is_low = (above > -math.inf and not number > above) or (at_least > -math.inf and not number >= at_least)
    if is_low or (finite and not math.isfinite(number)):
        limits = ["positive" if above == 0 else f"above {above:g}"] if above > -math.inf else []
        limits += [f"at least {at_least:g}"] if at_least > -math.inf else []
        limits += ["finite"] if finite else []
        raise ValueError(f"{name} must be {' and '.join(limits) or 'a number'}, got {number:g}.")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False, as Python's own.

    Raises:
        TypeError: it is something else; a string such as "no" would count as true.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}.")
    return bool(value)


def given(name: str, value: T | None) -> T:
    """A value that may not be None; raises `TypeError` where it is."""
    if value is None:
        raise TypeError(f"{name} must have a value, got None.")
    return value


def generator_or_none(name: str, value: Any) -> torch.Generator | None:
    """A `torch.Generator`, or None.

    Raises:
        TypeError: it is something else, such as a seed.
    """
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"{name} must be a torch.Generator, such as torch.Generator().manual_seed(0), or None, got {shown(value)}."
        )
    return value


def tensor(name: str, value: Any, form: str, n_axes: int | None = None) -> Tensor:
    """A tensor, of as many axes as `n_axes` says, if it does.

    Args:
        name: of the argument.
        value: what was given.
        form: what it should be, as in "of images [N, C, H, W]".
        n_axes: number of its axes.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, Tensor) or (n_axes is not None and value.ndim != n_axes):
        raise TypeError(f"{name} must be a tensor {form}, got {shown(value)}.")
    return value


def path_of(name: str, value: Any) -> Path:
    """The path of a file or folder.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{name} must be the path of a file or folder, got {shown(value)}.")
    return Path(value)


def shown(value: Any) -> str:
    """A value in a message: a short one as it is, of others what they are."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (str, bytes, int, float, complex, type(None), np.generic)) and len(repr(value)) <= 60:
        return repr(value.item() if isinstance(value, np.generic) else value)
    if isinstance(value, (list, tuple, set, Mapping)) and len(repr(value)) <= 60:
        return repr(value)
    return f"a {type(value).__name__}"
