"""Laplace posterior with Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from laplace_ws.kfac import FactorPrecision, KfacApproxSpec, KronAccumulator, approximation_by_parameter
from laplace_ws.likelihoods import Likelihood
from laplace_ws.matrices import Kron
from laplace_ws.posterior.accumulated import AccumulatedLaplace


class FactoredLaplace(AccumulatedLaplace):
    """What posteriors of Kronecker factors have in common.

    Args:
        model: a trained network.
        likelihood: see `BaseLaplace`.
        kfac_approx: "auto", "expand", "reduce", or a mapping from patterns of parameter names to them.
        factor_precision: of the products that make up the factors: "float32", "tf32" or "bf16", see `FactorPrecision`.
        **options: see `BaseLaplace`.
    """

    per_weight_prior = False

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        kfac_approx: KfacApproxSpec = "auto",
        factor_precision: str | FactorPrecision = "float32",
        **options: Any,
    ):
        super().__init__(model, likelihood, **options)
        self.factor_precision = FactorPrecision(factor_precision)
        self.approximations = approximation_by_parameter(kfac_approx, self.parameter_names)

    def _make_accumulator(self, parameters: Mapping[str, nn.Parameter]) -> KronAccumulator:
        return KronAccumulator(parameters, self.approximations, self.factor_precision)

    def _options(self) -> dict[str, Any]:
        approximations = {name: a.value for name, a in self.approximations.items()}
        return super()._options() | {"kfac_approx": approximations, "factor_precision": self.factor_precision.value}


class KronLaplace(FactoredLaplace):
    """Laplace posterior whose precision is, for each parameter, a Kronecker product plus the prior's precision.

    Takes the arguments of `FactoredLaplace`.
    """

    hessian_structure = "kron"
    _matrix = Kron
