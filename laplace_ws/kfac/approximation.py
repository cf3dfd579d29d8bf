"""Which K-FAC approximation each parameter gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from laplace_ws.registry import Choice, nearest


class KfacApprox(Choice):
    """K-FAC for weight-shared layers [Eschenhagen et al. 2023].

    `AUTO` takes reduce for parameters in the reduce setting, whose sharing positions are averaged or summed with nothing nonlinear
    behind them (see `curvature.setting`), and expand for all others: what reduce keeps of the curvature is too little where
    positions meet behind a nonlinearity, as those of convolutions do.
    """

    AUTO = "auto"
    EXPAND = "expand"
    REDUCE = "reduce"

    def decided(self, in_reduce_setting: bool) -> KfacApprox:
        """This one, or what `AUTO` takes for a parameter."""
        if self is not KfacApprox.AUTO:
            return self
        return KfacApprox.REDUCE if in_reduce_setting else KfacApprox.EXPAND

    @classmethod
    def _hint(cls) -> str:
        return ", or map patterns of names to them"


KfacApproxSpec = str | KfacApprox | Mapping[str, str | KfacApprox]


def approximation_by_parameter(spec: KfacApproxSpec, names: Sequence[str]) -> dict[str, KfacApprox]:
    """Approximation of each parameter.

    Args:
        spec: one approximation for all, or a mapping from patterns of parameter names (`"layer1.*"`) to approximations, of which
            the first match applies; a parameter that no pattern matches gets "auto".
        names: parameter names.

    Raises:
        ValueError: an unknown approximation, or a pattern that matches no parameter.
    """
    if not isinstance(spec, Mapping):
        return dict.fromkeys(names, KfacApprox(spec))
    patterns = {pattern: KfacApprox(value) for pattern, value in spec.items()}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = nearest(pattern, names, cutoff=0.0)
            hint = "" if near is None else f"; the nearest name is {near!r}"
            raise ValueError(f"kfac_approx pattern {pattern!r} matches no parameter that requires grad{hint}.")
    return {
        name: next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), KfacApprox.AUTO)
        for name in names
    }
