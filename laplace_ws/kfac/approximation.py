"""Which K-FAC approximation each parameter gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from fnmatch import fnmatchcase


class KfacApprox(str, Enum):
    """K-FAC for weight-shared layers [Eschenhagen et al. 2023].

    `AUTO` picks by the paper's two settings: outputs `[N, C]` are the reduce setting (the sharing positions are averaged or summed
    before the loss), outputs `[N, T, C]` the expand setting (the positions reach the loss as separate terms).
    """

    AUTO = "auto"
    EXPAND = "expand"
    REDUCE = "reduce"


KfacApproxSpec = str | KfacApprox | Mapping[str, str | KfacApprox]


def parse_kfac_approx(value: str | KfacApprox) -> KfacApprox:
    """Turn a string into a `KfacApprox`."""
    try:
        return KfacApprox(value)
    except ValueError:
        names = ", ".join(repr(member.value) for member in KfacApprox)
        raise ValueError(
            f"unknown kfac_approx {value!r}: choose one of {names}, or map patterns of names to them."
        ) from None


def approximation_by_parameter(spec: KfacApproxSpec, names: Sequence[str]) -> dict[str, KfacApprox]:
    """Approximation of each parameter.

    Args:
        spec: one approximation for all, or a mapping from patterns of parameter names (`"layer1.*"`) to approximations, of which the
            first that matches counts; a parameter that no pattern matches gets "auto".
        names: parameter names.

    Raises:
        ValueError: an unknown approximation, or a pattern that matches no parameter.
    """
    if not isinstance(spec, Mapping):
        return dict.fromkeys(names, parse_kfac_approx(spec))
    patterns = {pattern: parse_kfac_approx(value) for pattern, value in spec.items()}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=1, cutoff=0.0)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise ValueError(f"kfac_approx pattern {pattern!r} matches no parameter that requires grad{hint}.")
    return {
        name: next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), KfacApprox.AUTO)
        for name in names
    }
